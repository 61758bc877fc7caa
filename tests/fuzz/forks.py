"""Trials in forks of a process that has the imports done: each has a folder, a terminal and a time limit of its own."""

import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Trial:
    """How one attempt ended.

    Attributes:
        code: the exit code; None where it was still running at the limit, and was killed.
        out, err: what it printed.
        left: files and folders that were not there before.
        took_s: how long it took.
    """

    code: int | None
    out: str
    err: str
    left: frozenset[str]
    took_s: float


@dataclass(frozen=True)
class Row:
    """What came of many attempts of one kind.

    Attributes:
        what: what was tried.
        times: how often.
        outcomes: how often each outcome came.
        faults: every attempt that must not end so, in words.
    """

    what: str
    times: int
    outcomes: dict[str, int]
    faults: tuple[str, ...]


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table, and the faults below it."""
    rows = list(rows)
    lines = ["| what | how often | what happened |", "|---|---|---|"]
    for row in rows:
        happened = ", ".join(f"{count} {outcome}" for outcome, count in sorted(row.outcomes.items()))
        lines.append(f"| {row.what} | {row.times} | {happened} |")
    return "\n".join([*lines, "", *(f"- {fault}" for row in rows for fault in row.faults)])


def counted(what: str, outcomes: Iterable[tuple[str, str]]) -> Row:
    """A row from pairs of an outcome and, where it is a fault, its description."""
    pairs = list(outcomes)
    return Row(what, len(pairs), dict(Counter(name for name, _ in pairs)), tuple(fault for _, fault in pairs if fault))


def forked(work: Callable[[], object], folder: Path, limit_s: float) -> Trial:
    """Runs `work` in a fork, in `folder`, and waits for it."""
    before, started = listing(folder), time.monotonic()
    with contextlib.ExitStack() as stack:
        out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _child(work, folder, out.fileno(), err.fileno())
        code = _wait(pid, started + limit_s)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Trial(code, texts[0], texts[1], frozenset(listing(folder) - before), time.monotonic() - started)


def _child(work: Callable[[], object], folder: Path, out: int, err: int) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, end: float) -> int | None:
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """A folder for one trial, gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare() -> None:
    """Imports what a run imports, once, with one thread, which a fork takes over."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    import torch

    torch.set_num_threads(1)
    import selfdistill.runs.session
    import selfdistill.training.build  # noqa: F401

    gc.collect()
    gc.freeze()
