"""Disks that are full or cannot be written to, and folders that disappear: a message, a status, and nothing torn.

python -m tests.torture disk
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from tests.fuzz.forks import Row, Trial, counted, empty_folder
from tests.torture import faults
from tests.torture.trials import RUNS, arguments, difference, fault, runs_in, summary, trained, unbroken

POINTS = 12
SIZES_KIB = (4, 16, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144)
FILES = (
    "metrics.jsonl", "completions.jsonl", "summary.json", "config.yaml", ".lock", ".reserve", "prompts.md", "model",
    "complete", "trainer_state.json", "optimizer.pt", "rng_state.pth", "completions.json", "error.txt", "checkpoints",
)  # fmt: skip
RUN = next(iter(RUNS))


def rows() -> list[Row]:
    """What came of full disks, of files that cannot be written, and of folders that are deleted or moved."""
    count = len(unbroken(RUN)[1])
    points = [1 + round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)]
    found = [
        counted("no space from a change of a file on, then space again", [_full(point) for point in points]),
        counted("a file that cannot be opened for writing", [_refused(name) for name in FILES]),
        counted("the run's folder deleted", [_gone(point, faults.DELETED) for point in points]),
        counted("the run's folder moved away", [_gone(point, faults.MOVED) for point in points]),
    ]
    if os.geteuid() == 0 and _can_mount():
        sizes = f"a tmpfs of {SIZES_KIB[0]} KiB to {SIZES_KIB[-1] // 1024} MiB, then a larger one"
        found.append(counted(sizes, [_small_disk(size) for size in SIZES_KIB]))
    return found


def _judged(trial: Trial, what: str) -> tuple[str, str]:
    """How a command ended that met the fault: with a message, or wrongly."""
    if "Traceback" in trial.err + trial.out:
        return "traceback", f"{what}: {trial.err.strip().splitlines()[-1][:300]}"
    if trial.code == 0:
        return "finished", ""
    if not trial.err.startswith("selfdistill: ") and "\nselfdistill: " not in trial.err:
        return "no message", f"{what}: exit code {trial.code}, {trial.err[-300:]!r}"
    return "a message", ""


def _ends(folder: Path, what: str) -> tuple[str, str]:
    """What comes of the run once nothing stands in its way any more."""
    begun = runs_in(folder)
    if not begun:
        return "not begun, nothing left", ""
    for log in ("metrics.jsonl", "completions.jsonl"):
        for line in (begun[0] / log).read_text().splitlines() if (begun[0] / log).exists() else ():
            json.loads(line)  # a torn one raises
    status = summary(begun[0])["status"]
    if status == "running":
        return "no status", f"{what}: the status is still running"
    if status != "finished":
        trial = trained([f"resume={begun[0]}"], folder)
        if trial.code != 0:
            return "not resumed", f"{what}: {trial.err[-300:]}"
    wrong = difference(begun[0], unbroken(RUN)[0])
    return ("other numbers", f"{what}: {wrong}") if wrong else (f"{status}, then the same", "")


def _full(point: int) -> tuple[str, str]:
    what = f"no space from change {point} ({unbroken(RUN)[1][point - 1]}) on"
    with empty_folder() as folder:
        outcome, wrong = _judged(trained(arguments(RUN), folder, fault(folder, point, faults.FULL)), what)
        return (outcome, wrong) if wrong else _ends_of_full(folder, what)


def _ends_of_full(folder: Path, what: str) -> tuple[str, str]:
    """As `_ends`; nothing at all could be written here, so that the status is not to be expected."""
    begun = runs_in(folder)
    if begun and summary(begun[0])["status"] == "running":
        trial = trained([f"resume={begun[0]}"], folder)
        wrong = trial.err[-300:] if trial.code else difference(begun[0], unbroken(RUN)[0])
        return ("other numbers", f"{what}: {wrong}") if wrong else ("a message, then the same", "")
    return _ends(folder, what)


def _refused(name: str) -> tuple[str, str]:
    what = f"{name} cannot be written"
    with empty_folder() as folder:
        outcome, wrong = _judged(trained(arguments(RUN), folder, fault(folder, 0, faults.REFUSED, name)), what)
        return (outcome, wrong) if wrong else _ends_of_full(folder, what)


def _gone(point: int, kind: int) -> tuple[str, str]:
    what = f"the folder gone at change {point} ({unbroken(RUN)[1][point - 1]})"
    with empty_folder() as folder:
        outcome, wrong = _judged(trained(arguments(RUN), folder, fault(folder, point, kind)), what)
        if wrong or outcome == "a message":
            return outcome, wrong
        begun = runs_in(folder)
        if not begun or difference(begun[0], unbroken(RUN)[0]):
            return "finished without its folder", f"{what}: exit code 0"
        return "not met: finished, the same", ""


def _can_mount() -> bool:
    with empty_folder() as folder:
        return _mounted(folder, 64) and not subprocess.run(["umount", folder], check=False).returncode


def _mounted(folder: Path, size_kib: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _small_disk(size_kib: int) -> tuple[str, str]:
    what = f"a disk of {size_kib} KiB"
    with empty_folder() as folder:
        disk = folder / "outputs"
        disk.mkdir()
        _mounted(disk, size_kib)
        try:
            outcome, wrong = _judged(trained(arguments(RUN), folder), what)
            if wrong:
                return outcome, wrong
            shutil.copytree(disk, folder / "rescued", dirs_exist_ok=True)
        finally:
            subprocess.run(["umount", disk], check=False)
        disk.rmdir()
        (folder / "rescued").rename(disk)
        return _ends(folder, what)
