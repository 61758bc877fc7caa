"""Exports that a real llama.cpp writes and loads again.

`make gguf` makes an environment with it; SELFDISTILL_GGUF names another folder. Without one these tests skip.
"""

import os
from pathlib import Path

from selfdistill.models.export.llama_cpp import find
from tests.engines import hooks

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("SELFDISTILL_GGUF", ROOT / ".venv-gguf"))
LACKS = find(str(FOLDER)).lacks() if FOLDER.is_dir() else "there is no such folder"
MISSING = (
    f"NO llama.cpp IN {FOLDER}: {LACKS}. Nothing in tests/gguf ran. `make gguf` builds it, or set SELFDISTILL_GGUF "
    "to a folder that has it."
)

pytest_collection_modifyitems, pytest_terminal_summary = hooks(
    Path(__file__).parent, "llama.cpp", MISSING if LACKS else None, long=True
)
