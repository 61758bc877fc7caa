"""Whether a value fits a type annotation, and what to write where it does not."""

import types
import typing
from typing import Any, get_args, get_origin

INSTEAD = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, e.g. [a,b]",
    dict: "keys and values, e.g. {a: 1}",
}


def mismatch(value: Any, hint: Any) -> str | None:
    """What to write instead of a value that its annotation does not take; None where it fits.

    Judges numbers, truth values, texts, lists, mappings and literals; any other annotation takes everything.
    """
    union = get_origin(hint) in (typing.Union, types.UnionType)
    options = get_args(hint) if union else (hint,)
    wanted: list[str] = []
    for option in options:
        kind = get_origin(option) or option
        if option is type(None) or option is None:
            fits, write = value is None, "null"
        elif kind is typing.Literal:
            fits, write = value in get_args(option), " or ".join(map(str, get_args(option)))
        elif kind in INSTEAD:
            fits, write = _fits(value, kind, get_args(option)), INSTEAD[kind]
            if kind is list and get_args(option) == (str,):
                write = "a list of texts"
            if kind is str and isinstance(value, bool | int | float):
                write = f"text, in quotes: '\"{value}\"'"
        else:
            return None
        if fits:
            return None
        wanted.append(write)
    return " or ".join(wanted)


def _fits(value: Any, kind: Any, arguments: tuple[Any, ...]) -> bool:
    if kind is list:
        return isinstance(value, list) and not any(arguments and mismatch(item, arguments[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
