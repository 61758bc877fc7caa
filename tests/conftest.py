import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

from tests import checker  # noqa: E402
from tests.launched import Launcher  # noqa: E402

# Every annotated tensor shape of the package is checked at run time in the tests.
install_import_hook("selfdistill", f"{checker.__name__}.checked")


@pytest.fixture(scope="module")
def launch() -> Iterator[Launcher]:
    """Starts programs in several processes."""
    launcher = Launcher()
    yield launcher
    launcher.close()
