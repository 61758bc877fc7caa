"""An installed unsloth for the tests, without a GPU: what we call is held against it, and nothing is loaded.

`make unsloth` makes an environment with unsloth and this project, whose Python runs these tests. Any other one skips
them.
"""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.engines import items_below, say_loudly

os.environ["UNSLOTH_ALLOW_CPU"] = "1"
os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp(prefix="unsloth-")  # what it writes is not for this folder
HERE = find_spec("unsloth") is not None
MISSING = (
    "NO unsloth IN THIS PYTHON: nothing in tests/unsloth ran. `make unsloth`, then "
    ".venv-unsloth/bin/python -m pytest tests/unsloth"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items_below(Path(__file__).parent, items):
        if not HERE:
            item.add_marker(pytest.mark.skip(reason=MISSING))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not HERE:
        say_loudly(terminalreporter, "unsloth", MISSING)
