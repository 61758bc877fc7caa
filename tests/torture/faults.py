"""Faults at a chosen change of a file: a small C library, compiled here, preloaded into the process that has them."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
COUNT, FULL, REFUSED, MOVED, DELETED = 0, 100, 101, 102, 103  # as in the source; below 100: a signal's number
PRELOAD = "LD_PRELOAD"


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ[PRELOAD])


def is_preloaded() -> bool:
    """Whether this process can have faults."""
    return Path(os.environ.get(PRELOAD, "")).name == "libfaults.so"


def start_again(module: str, arguments: list[str]) -> int:
    """Runs a module in a new process that can have faults; returns its exit code."""
    folder = tempfile.mkdtemp(prefix="faults-")
    library = Path(folder, "libfaults.so")
    try:
        build = [str(compiler()), "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(build, check=True)
        environment = {**os.environ, PRELOAD: str(library), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode
    finally:
        shutil.rmtree(folder)


def with_fault(work: Callable[[], None], below: Path, number: int, kind: int, name: str = "", log: str = "") -> None:
    """Does some work with a fault at the `number`-th change of a file below a folder.

    Args:
        kind: a signal's number, or one of this module's constants.
        name: of the file that cannot be written, where the fault is REFUSED.
        log: file to which every change is written down.
    """
    library = _library()
    os.environ.pop(PRELOAD)  # git and other programs are left alone
    library.fault_arm(str(below).encode(), ctypes.c_long(number), kind, name.encode(), log.encode())
    work()
