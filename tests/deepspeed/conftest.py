"""DeepSpeed on a CPU, in an environment of its own on top of the project's packages.

`make deepspeed` makes it, and its Python runs these tests. Another Python skips them.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.engines import items_below, say_loudly

HERE = find_spec("deepspeed") is not None
MISSING = (
    "NO DeepSpeed IN THIS PYTHON: nothing in tests/deepspeed ran. `make deepspeed`, then .venv-deepspeed/bin/python "
    "-m pytest tests/deepspeed"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items_below(Path(__file__).parent, items):
        item.add_marker(pytest.mark.long)
        if not HERE:
            item.add_marker(pytest.mark.skip(reason=MISSING))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not HERE:
        say_loudly(terminalreporter, "DeepSpeed", MISSING)
