"""DeepSpeed on a CPU, in an environment of its own on top of the project's packages.

`make deepspeed` makes it, and its Python runs these tests. Another Python skips them.
"""

from importlib.util import find_spec
from pathlib import Path

from tests.engines import hooks

HERE = find_spec("deepspeed") is not None
MISSING = (
    "NO DeepSpeed IN THIS PYTHON: nothing in tests/deepspeed ran. `make deepspeed`, then .venv-deepspeed/bin/python "
    "-m pytest tests/deepspeed"
)

pytest_collection_modifyitems, pytest_terminal_summary = hooks(
    Path(__file__).parent, "DeepSpeed", None if HERE else MISSING, long=True
)
