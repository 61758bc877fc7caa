"""Reference values and real data that are not part of this repository; tests that need them skip where they are absent.

They are looked for in the folder SELFDISTILL_SHARED names, and in `shared` beside the checkout.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def _shared(*parts: str) -> Path:
    folders = [os.environ.get("SELFDISTILL_SHARED"), ROOT.parent / "shared", ROOT / "shared"]
    for folder in folders:
        if folder and (path := Path(folder, *parts)).exists():
            return path
    pytest.skip(f"{'/'.join(parts)} is not here")


def golden(name: str) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """Parameters of each case, and the arrays named case/tensor."""
    cases = json.loads(_shared("golden", f"{name}.json").read_text())["cases"]
    with np.load(_shared("golden", f"{name}.npz")) as arrays:
        return cases, {key: arrays[key] for key in arrays.files}


def real_data(name: str) -> Path:
    """The path of a real data file."""
    return _shared("data", name)
