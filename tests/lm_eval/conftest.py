"""lm-eval in an environment of its own, on top of the project's packages, whose start it would slow.

`make lm_eval` makes it; SELFDISTILL_LM_EVAL names another folder. Without one these tests skip.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.engines import items_below, say_loudly
from tests.reference import ROOT

PYTHON = Path(os.environ.get("SELFDISTILL_LM_EVAL", ROOT / ".venv-lm-eval")) / "bin" / "python"
MISSING = (
    f"NO ENVIRONMENT WITH lm-eval: {PYTHON} is not there. Nothing in tests/lm_eval ran. `make lm_eval` makes it, or "
    "set SELFDISTILL_LM_EVAL to the folder of one."
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items_below(Path(__file__).parent, items):
        item.add_marker(pytest.mark.long)
        if not PYTHON.is_file():
            item.add_marker(pytest.mark.skip(reason=MISSING))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not PYTHON.is_file():
        say_loudly(terminalreporter, "lm-eval", MISSING)
