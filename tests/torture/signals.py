"""Signals at chosen changes of a run's files: it saves a checkpoint, ends with the signal's exit code, and goes on.

python -m tests.torture signals
"""

import signal

from tests.fuzz.forks import Row, counted, empty_folder
from tests.torture.trials import RUNS, arguments, difference, fault, runs_in, summary, trained, unbroken

POINTS = 12
CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
UNCAUGHT = (signal.SIGQUIT, signal.SIGALRM)


def rows() -> list[Row]:
    """What came of each signal, from the first change of a run's files to the last."""
    found = []
    for index, number in enumerate((*CAUGHT, *UNCAUGHT)):
        run = list(RUNS)[index % len(RUNS)]
        count = len(unbroken(run)[1])
        points = [1 + round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)]
        found.append(counted(f"{number.name}: {run}", [_signalled(run, number, point) for point in points]))
    return found


def _signalled(run: str, number: signal.Signals, point: int) -> tuple[str, str]:
    reference, changes = unbroken(run)
    what = f"{run}, {number.name} at {point} ({changes[point - 1]})"
    with empty_folder() as folder:
        trial = trained(arguments(run), folder, fault(folder, point, number))
        begun = runs_in(folder)
        expected = 128 + number if number in CAUGHT else -number
        if trial.code not in (expected, 0) or "Traceback" in trial.err:
            return "ended otherwise", f"{what}: exit code {trial.code}: {trial.err[-300:]}"
        if not begun:
            return "not begun, nothing left", ""
        status = summary(begun[0])["status"]
        if number in CAUGHT and status == "running":
            return "no status", f"{what}: the status is still running"
        if status != "finished":
            trial = trained([f"resume={begun[0]}"], folder)
            if trial.code != 0:
                return "not resumed", f"{what}: {trial.err[-300:]}"
        wrong = difference(begun[0], reference)
        return ("other numbers", f"{what}: {wrong}") if wrong else (f"{status}, then the same", "")
