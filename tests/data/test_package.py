"""What the package promises before anything is loaded: light imports, and a configuration that fits the function."""

import inspect
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from selfdistill.config.conf import CONF
from selfdistill.data import load_data

NAMES = sorted(path.stem for path in (CONF / "data").glob("[!_]*.yaml"))


def test_importing_the_data_package_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'trl'}"
    code = f"import sys, selfdistill.data; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_configuration_lists_every_argument(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = compose(overrides=[f"+data={name}"]).data
    keys = {str(key) for key in data} - {"_target_"}
    assert keys == set(inspect.signature(load_data).parameters) - {"tokenizer"}
    assert data._target_ == "selfdistill.data.load_data"
