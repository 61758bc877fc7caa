"""lm-eval in an environment of its own, on top of the project's packages, whose start it would slow.

`make lm_eval` makes it; SELFDISTILL_LM_EVAL names another folder. Without one these tests skip.
"""

import os
from pathlib import Path

from tests.engines import hooks
from tests.reference import ROOT

PYTHON = Path(os.environ.get("SELFDISTILL_LM_EVAL", ROOT / ".venv-lm-eval")) / "bin" / "python"
MISSING = (
    f"NO ENVIRONMENT WITH lm-eval: {PYTHON} is not there. Nothing in tests/lm_eval ran. `make lm_eval` makes it, or "
    "set SELFDISTILL_LM_EVAL to the folder of one."
)

pytest_collection_modifyitems, pytest_terminal_summary = hooks(
    Path(__file__).parent, "lm-eval", None if PYTHON.is_file() else MISSING, long=True
)
