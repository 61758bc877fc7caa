"""Whether a value fits a type annotation, and what to write where it does not."""

import types
import typing
from typing import Any, get_args, get_origin

from selfdistill.errors import UserError, quoted

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
        elif value is None and option not in (Any, object) and not isinstance(option, typing.TypeVar):
            fits, write = False, "something else than null"
        else:
            return None
        if fits:
            return None
        wanted.append(write)
    return " or ".join(wanted)


def check_kind(key: str, value: Any, hint: Any) -> None:
    """Raises UserError where an annotation does not take a key's value."""
    if wanted := mismatch(value, hint):
        raise UserError(f"{key}={quoted(value)}: write {wanted}.")


def as_hinted(value: Any, hint: Any) -> Any:
    """The value, a whole number as a float where its annotation says so: some libraries tell 1 from 1.0."""
    union = get_origin(hint) in (typing.Union, types.UnionType)
    options = get_args(hint) if union else (hint,)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and float in options and int not in options else value


def _fits(value: Any, kind: Any, arguments: tuple[Any, ...]) -> bool:
    if kind is list:
        return isinstance(value, list) and not any(arguments and mismatch(item, arguments[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
