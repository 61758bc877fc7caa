"""Exports that a real llama.cpp writes and loads again.

`make gguf` makes an environment with it; SELFDISTILL_GGUF names another folder. Without one these tests skip.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from selfdistill.models.export.llama_cpp import find
from tests.engines import items_below, say_loudly

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("SELFDISTILL_GGUF", ROOT / ".venv-gguf"))
LACKS = find(str(FOLDER)).lacks() if FOLDER.is_dir() else "there is no such folder"
MISSING = (
    f"NO llama.cpp IN {FOLDER}: {LACKS}. Nothing in tests/gguf ran. `make gguf` builds it, or set SELFDISTILL_GGUF "
    "to a folder that has it."
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items_below(Path(__file__).parent, items):
        item.add_marker(pytest.mark.long)
        if LACKS:
            item.add_marker(pytest.mark.skip(reason=MISSING))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if LACKS:
        say_loudly(terminalreporter, "llama.cpp", MISSING)
