"""An installed unsloth for the tests, without a GPU: what we call is held against it, and nothing is loaded.

`make unsloth` makes an environment with unsloth and this project, whose Python runs these tests. Any other one skips
them.
"""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tests.engines import hooks

os.environ["UNSLOTH_ALLOW_CPU"] = "1"
os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp(prefix="unsloth-")  # what it writes is not for this folder
HERE = find_spec("unsloth") is not None
MISSING = (
    "NO unsloth IN THIS PYTHON: nothing in tests/unsloth ran. `make unsloth`, then "
    ".venv-unsloth/bin/python -m pytest tests/unsloth"
)

pytest_collection_modifyitems, pytest_terminal_summary = hooks(
    Path(__file__).parent, "unsloth", None if HERE else MISSING
)
