"""The limits that a field of a dataclass declares.

A limit is declared once, in the field's metadata. The command line and the Python constructor check that declaration.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from selfdistill.errors import UserError

# Says what is wrong with a value and what to write instead; an empty text where nothing is.
Limit = Callable[[Any], str]


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
