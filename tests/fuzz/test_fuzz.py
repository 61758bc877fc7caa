"""A small part of what the two modules try in full: no attempt ends in a traceback, a riddle or a wrong reading."""

import pytest

from tests.fuzz import command_line, data_files
from tests.fuzz.forks import Row, Trial, table


@pytest.mark.long
def test_command_lines() -> None:
    found = command_line.rows(count=44, seed=1)
    assert sum(row.times for row in found) == 44
    assert [fault for row in found for fault in row.faults] == []


@pytest.mark.long
def test_data_files() -> None:
    found = data_files.rows(count=200, seed=1)
    assert sum(row.times for row in found) == 200
    assert [fault for row in found for fault in row.faults] == []


@pytest.mark.parametrize(
    ("trial", "outcome"),
    [
        (Trial(0, "", "", frozenset(), 1.0), "ran"),
        (Trial(2, "", "selfdistill: beta=x: write a number.\n", frozenset(), 1.0), "refused"),
        (Trial(2, "", "selfdistill: a\nb\n", frozenset(), 1.0), "no one line"),
        (Trial(1, "", "Traceback (most recent call last):\nKeyError: 'x'\n", frozenset(), 1.0), "traceback"),
        (Trial(2, "", f"selfdistill: {'x' * 9000}\n", frozenset(), 1.0), "too long"),
        (Trial(0, "", "", frozenset({"outputs"}), 1.0), "left something"),
        (Trial(None, "", "", frozenset(), 60.0), "not done in time"),
    ],
)
def test_what_counts_as_a_fault(trial: Trial, outcome: str) -> None:
    found, fault = command_line.judged(["beta=x"], trial, checked=True)
    assert found == outcome
    assert bool(fault) == (outcome not in ("ran", "refused"))


def test_the_same_seed_gives_the_same_lines() -> None:
    assert list(command_line.mutations(22, 3)) == list(command_line.mutations(22, 3))


def test_rows_are_shown_as_a_table() -> None:
    rows = [Row("data files: csv", 3, {"read": 2, "exception": 1}, ("file1.csv: broke",))]
    assert "| data files: csv | 3 | 1 exception, 2 read |" in table(rows)
    assert table(rows).endswith("- file1.csv: broke")
