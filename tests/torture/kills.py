"""Runs killed at chosen changes of their files, from the first to the last, and resumed: they end the same.

python -m tests.torture kills
"""

import random
import signal
from collections.abc import Sequence

from tests.fuzz.forks import Row, counted, empty_folder
from tests.torture.trials import RUNS, arguments, difference, fault, runs_in, summary, trained, unbroken

SAME, NOT_BEGUN = "the same", "not begun, nothing left"
KILLS, TWICE = 500, 60


def rows(kills: int = KILLS, twice: int = TWICE, seed: int = 0, only: int | None = None) -> list[Row]:
    """What came of so many kills, and of so many runs that were killed again while they were resumed.

    Args:
        only: the number of the one kind of run that gets its share of them; all kinds without it.
    """
    found = []
    wanted = [(index, run) for index, run in enumerate(RUNS) if only in (None, index)]
    for index, run in wanted:
        changes = unbroken(run)[1]
        share = _share(kills, index)
        # Evenly from the first to the last change: every one of them where there are no more than that.
        points = sorted({1 + round(i * (len(changes) - 1) / max(1, share - 1)) for i in range(share)})
        points = (points * share)[:share] if len(points) < share else points
        found.append(counted(f"kill -9: {run} ({len(changes)} changes of files)", [_killed(run, [p]) for p in points]))
    for index, run in wanted:
        draw = random.Random(seed + index)
        count = len(unbroken(run)[1])
        pairs = [[draw.randint(1, count), draw.randint(1, count // 2)] for _ in range(_share(twice, index))]
        found.append(counted(f"kill -9, and again while it is resumed: {run}", [_killed(run, pair) for pair in pairs]))
    return found


def _share(total: int, index: int) -> int:
    return total // len(RUNS) + (index < total % len(RUNS))


def _killed(run: str, points: Sequence[int]) -> tuple[str, str]:
    """The outcome of a run that is killed at a change of its files, and while resumed at another; and what is wrong."""
    reference, changes = unbroken(run)
    where = f"{run}, killed at {points[0]} ({changes[points[0] - 1]})" + "".join(f" and at {p}" for p in points[1:])
    outcome = SAME
    with empty_folder() as folder:
        for number, point in enumerate(points):
            given = [f"resume={runs_in(folder)[0]}"] if runs_in(folder) else arguments(run)
            trial = trained(given, folder, fault(folder, point, signal.SIGKILL))
            if number == 0 and trial.code != -signal.SIGKILL:
                return "not killed", f"{where}: exit code {trial.code}: {trial.err[-300:]}"
        begun = runs_in(folder)
        if not begun:
            outcome = NOT_BEGUN
        elif summary(begun[0])["status"] == "finished":
            wrong = difference(begun[0], reference)
            return ("other numbers", f"{where}: {wrong}") if wrong else (SAME, "")
        trial = trained([f"resume={begun[0]}"] if begun else arguments(run), folder)
        if trial.code != 0:
            return "not resumed", f"{where}: exit code {trial.code}: {trial.err[-300:]}"
        if len(runs_in(folder)) != 1 or any(path.name.startswith(".") for path in (folder / "outputs").iterdir()):
            return "something left", f"{where}: {sorted(path.name for path in (folder / 'outputs').iterdir())}"
        wrong = difference(runs_in(folder)[0], reference)
        return ("other numbers", f"{where}: {wrong}") if wrong else (outcome, "")
