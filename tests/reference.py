"""Reference values and real data, in tests/fixtures; its README says where they come from."""

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"


def golden(name: str) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """Parameters of each case, and the arrays named case/tensor."""
    cases = json.loads((FIXTURES / "golden" / f"{name}.json").read_text())["cases"]
    with np.load(FIXTURES / "golden" / f"{name}.npz") as arrays:
        return cases, {key: arrays[key] for key in arrays.files}


def real_data(name: str) -> Path:
    """The path of a real data file."""
    return FIXTURES / "data" / name
