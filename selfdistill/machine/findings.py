"""What the doctor finds: lines, each with a state and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

State = Literal["ok", "warning", "error"]
COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        what: the thing looked at.
        state: `error` for what will not work, `warning` for what may not.
        found: what was found.
        advice: what to do about it; empty where nothing is to be done.
    """

    what: str
    state: State
    found: str
    advice: str = ""


def ok(what: str, found: str) -> Line:
    return Line(what, "ok", found)


def warning(what: str, found: str, advice: str) -> Line:
    return Line(what, "warning", found, advice)


def error(what: str, found: str, advice: str) -> Line:
    return Line(what, "error", found, advice)


def table(lines: Sequence[Line]) -> Table:
    """The findings as a table."""
    result = Table(box=None, pad_edge=False, show_header=False)
    result.add_column(no_wrap=True)
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    for line in lines:
        text = f"{line.found}\n→ {line.advice}" if line.advice else line.found
        result.add_row(f"[{COLOURS[line.state]}]{line.state}[/]", line.what, text.replace("[", r"\["))
    return result
