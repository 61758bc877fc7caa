"""Tests against programs that are not everywhere skip, and say so in red at the end of pytest's output."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def items_below(folder: Path, items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """The tests that lie in a folder; pytest gives a folder's hook those of all others as well."""
    return (item for item in items if folder in item.path.parents)


def say_loudly(reporter: Any, what: str, missing: str) -> None:
    """A section of pytest's closing lines that cannot be missed."""
    reporter.section(what, sep="!", red=True)
    reporter.line(missing, red=True)


def hooks(folder: Path, what: str, missing: str | None, *, long: bool = False) -> tuple[Callable, Callable]:
    """pytest_collection_modifyitems and pytest_terminal_summary of a folder whose tests need another program.

    Args:
        missing: what is not there, and how to get it; None where it is.
        long: whether the tests are marked long.
    """

    def mark(items: list[pytest.Item]) -> None:
        for item in items_below(folder, items):
            if long:
                item.add_marker(pytest.mark.long)
            if missing is not None:
                item.add_marker(pytest.mark.skip(reason=missing))

    def say(terminalreporter: Any) -> None:
        if missing is not None:
            say_loudly(terminalreporter, what, missing)

    return mark, say
