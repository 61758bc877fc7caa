"""Every file of a run's newest checkpoint deleted, halved, emptied or replaced by noise, and the run resumed.

python -m tests.torture damage
"""

import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from selfdistill.training.checkpoints import damage, mark
from tests.fuzz.forks import Row, counted, empty_folder
from tests.torture.trials import RUNS, arguments, difference, fault, runs_in, trained, unbroken


def _noise(file: Path) -> None:
    file.write_bytes(random.Random(0).randbytes(file.stat().st_size))


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "halved": _halve,
    "emptied": lambda file: file.write_bytes(b""),
    "noise": _noise,
}
KEPT = "training.keep_checkpoints=2"


def rows() -> list[Row]:
    """What came of every damage to every file, in each kind of run; and of runs whose checkpoints are all damaged."""
    found = []
    for run in RUNS:
        files = sorted(
            str(p.relative_to(_newest(_killed(run)))) for p in _newest(_killed(run)).rglob("*") if p.is_file()
        )
        outcomes = [_damaged(run, file, how) for file in files for how in DAMAGES]
        found.append(counted(f"the newest of two checkpoints, {len(files)} files: {run}", outcomes))
    found.append(counted("all checkpoints", [_all_damaged(run) for run in RUNS]))
    found.append(counted("none: the check of a checkpoint of 1 GB", [(f"{_seconds_of_check():.1f} s", "")]))
    return found


def _seconds_of_check() -> float:
    with empty_folder() as folder:
        with (folder / "model.safetensors").open("wb") as file:
            for _ in range(125):
                file.write(bytes(8_000_000))
        mark(folder)
        started = time.perf_counter()
        damage(folder)
        return time.perf_counter() - started


@cache
def _killed(run: str) -> Path:
    """A run that was killed in its last step, with the checkpoints of steps 2 and 4."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    marked = [number for number, change in enumerate(unbroken(run)[1], start=1) if "checkpoint-5/" in change]
    trained([*arguments(run), KEPT], folder, fault(folder, marked[0], signal.SIGKILL))
    (path,) = runs_in(folder)
    return path


def _newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("checkpoint-*/complete"))[-1].parent


def _damaged(run: str, file: str, how: str) -> tuple[str, str]:
    what = f"{run}: {file} {how}"
    with empty_folder() as folder:
        copy = folder / "outputs" / _killed(run).name
        shutil.copytree(_killed(run), copy)
        DAMAGES[how](_newest(copy) / file)
        trial = trained([f"resume={copy}"], folder)
        if trial.code != 0:
            return "not resumed", f"{what}: {trial.err[-300:]}"
        # Two checkpoints are kept here, one in the run that it is compared with.
        for checkpoint in (copy / "checkpoints").iterdir():
            if checkpoint.name not in {path.name for path in (unbroken(run)[0] / "checkpoints").iterdir()}:
                shutil.rmtree(checkpoint)
        fell_back = "is damaged" in trial.out or file == "complete"
        where = Path("checkpoints", _newest(_killed(run)).name, file)
        kept, unharmed = copy / where, unbroken(run)[0] / where
        if not fell_back and unharmed.exists():
            shutil.copy(unharmed, kept)  # the model card, which counts for nothing and is not written again
        wrong = difference(copy, unbroken(run)[0])
        if wrong:
            return "other numbers", f"{what}: {wrong}"
        return ("the same, from the one before" if fell_back else "the same, of no matter"), ""


def _all_damaged(run: str) -> tuple[str, str]:
    with empty_folder() as folder:
        copy = folder / "outputs" / _killed(run).name
        shutil.copytree(_killed(run), copy)
        for marker in (copy / "checkpoints").glob("*/complete"):
            (marker.parent / "optimizer.pt").unlink()
        trial = trained([f"resume={copy}"], folder)
        refused = trial.code == 2 and "none of its checkpoints is whole" in trial.err and "Traceback" not in trial.err
        if not refused:
            return "not refused", f"{run}: exit code {trial.code}: {trial.err[-300:]}"
        return "refused, each damage named", ""
