"""Nothing that a library logs while it is imported stands before our own words, on whatever CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# bitsandbytes asks this of the CPU while it is imported; the answer is replaced in time.
STUBBED = """
from importlib.machinery import SourceFileLoader
def exec_module(loader, module, original=SourceFileLoader.exec_module):
    original(loader, module)
    if module.__name__ == "bitsandbytes.functional":
        module.has_avx512bf16 = lambda: {has}
SourceFileLoader.exec_module = exec_module
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("has", [True, pytest.param(False, marks=pytest.mark.long)])
def test_importing_says_nothing_and_later_words_pass(tmp_path: Path, has: bool) -> None:
    pytest.importorskip("bitsandbytes")
    done = run(
        f"{STUBBED.format(has=has)}\nimport selfdistill, bitsandbytes.backends.cpu.ops as ops\n"
        "ops.logger.error('something else')",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "something else\n"


def test_a_refusal_begins_with_our_words(tmp_path: Path) -> None:
    program = (
        f"{STUBBED.format(has=True)}\nimport runpy, sys\nsys.argv = ['train', 'data=jsonl', 'data.path=absent.jsonl']\n"
        "runpy.run_module('selfdistill.train', run_name='__main__', alter_sys=True)"
    )
    done = run(program, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("selfdistill: data.path=absent.jsonl")
    assert len(done.stderr.splitlines()) == 1
