"""Our calls fit the installed unsloth, and our trainer keeps its hooks beside it."""

import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from selfdistill import config
from selfdistill.machine.packages import Facts, installed
from selfdistill.training.unsloth import adapter_arguments, check_versions, loading_arguments
from tests.command import composed
from tests.reference import ROOT

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
COLOCATED = ["hardware=gpu_24gb", "model=qwen3_0_6b", "model.loader=unsloth"]
ALONE = ["hardware=gpu_16gb", *COLOCATED[1:], "model.load_in_4bit=true", "model.dtype=bfloat16"]


def named(function: Any) -> set[str]:
    """The parameters that have a name: beside them these functions take any others, and pass them on."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds}


@pytest.mark.parametrize("overrides", [COLOCATED, ALONE], ids=["colocated", "alone"])
def test_what_we_call_exists(overrides: list[str]) -> None:
    unsloth = import_module("unsloth")
    run = config.check(composed(overrides))
    assert loading_arguments(run).keys() <= named(unsloth.FastLanguageModel.from_pretrained)
    assert adapter_arguments(run).keys() <= named(unsloth.FastLanguageModel.get_peft_model)


def test_the_versions_installed_here_go_together() -> None:
    check_versions(Facts(installed(), gpu=True))


def test_the_variable_for_standby_is_the_one_that_it_reads() -> None:
    source = Path(str(import_module("unsloth_zoo").__file__)).with_name("vllm_utils.py").read_text()
    assert 'os.getenv("UNSLOTH_VLLM_STANDBY", "0")' in source


def test_a_shared_engine_is_in_trls_generation(tmp_path: Path) -> None:
    """It takes the engine of the model, pushes no weights and hands the adapter over, whoever the trainer is."""
    program = (
        "import tests.unsloth.rewritten, inspect\n"
        "from trl.generation.vllm_generation import VLLMGeneration as generation\n"
        "assert 'model.vllm_engine' in inspect.getsource(generation._init_vllm)\n"
        "assert 'shared_weights' in inspect.getsource(generation.sync_weights)\n"
        "assert generation.generate._unsloth_vllm_generation_lora_wrapped\n"
    )
    done(["-c", program], tmp_path)


def test_our_trainer_keeps_its_hooks_where_trl_was_rewritten(tmp_path: Path) -> None:
    """The contract's tests, in a process in which unsloth has done to TRL what it does beside a GPU."""
    contract = str(ROOT / "tests" / "training" / "test_contract.py")
    how = ["-p", "tests.unsloth.rewritten", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(ROOT)]
    printed = done(["-m", "pytest", *how, contract], tmp_path)
    assert " passed" in printed and "skipped" not in printed, printed


def done(words: list[str], folder: Path) -> str:
    """What a Python printed that ended well; unsloth writes the trainers that it compiles into the folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *words]
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout
