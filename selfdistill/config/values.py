"""What a value may be: the type that an annotation names, and the limits that a field of a dataclass declares.

A limit is declared once, in the field's metadata. The command line and the Python constructor check that declaration.
"""

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_args, get_origin

from selfdistill.errors import UserError

# Says what is wrong with a value and what to write instead; an empty text where nothing is.
Limit = Callable[[Any], str]
INSTEAD = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list, e.g. [a,b]",
    dict: "keys and values, e.g. {a: 1}",
}


def number(low: float | None = None, high: float | None = None, *, above: float | None = None) -> dict[str, Limit]:
    """Metadata of a field that holds a finite number, at least `low` or above `above`, and at most `high`."""
    named = {"above": above, "at least": low, "at most": high}
    bounds = " and ".join(f"{word} {bound}" for word, bound in named.items() if bound is not None)

    def limit(value: float) -> str:
        if not math.isfinite(value):
            return ": write a finite number."
        too_low = (low is not None and value < low) or (above is not None and value <= above)
        too_high = high is not None and value > high
        return f" is out of range: write a number {bounds}." if too_low or too_high else ""

    return {"limit": limit}


def one_of(*choices: str | None) -> dict[str, Limit]:
    """Metadata of a field that holds one of these texts; None stands for null."""
    shown = ", ".join("null" if choice is None else choice for choice in choices)
    return {"limit": lambda value: "" if value in choices else f": write one of {shown}."}


def check_limits(schema: type, values: Mapping[str, Any], written: Callable[[str], str]) -> None:
    """Checks one value for each field of the dataclass `schema`; None is allowed wherever the type allows it.

    Args:
        written: gives `KEY=VALUE` for the name of a field, as the person who wrote it knows it.

    Raises:
        UserError: the first value that its field's limit refuses.
    """
    for field in fields(schema):
        limit, value = field.metadata.get("limit"), values[field.name]
        if limit is not None and value is not None and (refusal := limit(value)):
            raise UserError(f"{written(field.name)}{refusal}")


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
