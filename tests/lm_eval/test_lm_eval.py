"""Runs the tests of `inside.py` where lm-eval is installed."""

import os
import subprocess
from pathlib import Path

from tests.lm_eval.conftest import PYTHON
from tests.reference import ROOT


def test_inside_its_environment() -> None:
    command = [
        PYTHON,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-x",
        "--noconftest",
        str(Path(__file__).parent / "inside.py"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
