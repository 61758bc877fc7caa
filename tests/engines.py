"""Tests against programs that are not everywhere skip, and say so in red at the end of pytest's output."""

from collections.abc import Iterator
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
