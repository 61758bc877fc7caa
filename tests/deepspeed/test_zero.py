"""ZeRO-2 and ZeRO-3 in two processes on a CPU, as accelerate starts them: the numbers of one process."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import accelerated
from tests.launched import Launcher
from tests.sharded import CASES, Train, assert_same_numbers, trained
from tests.test_processes import COMMON, METHODS, gathered, only_run, summary

# Those in which nobody but the trainer's own passes looks into the divided weights.
POLICY_GRADIENT = ["grpo in full, without a reference", "grpo with lora"]
ROWS = ["completions_per_step=16", "hardware.per_device_batch_size=8", "logger=none"]


@pytest.fixture(scope="module", autouse=True)
def _on_a_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "extensions"))  # which `make deepspeed` compiled
        patch.setenv("PATH", f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}")  # where ninja is
        yield


@pytest.fixture(scope="module")
def train(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Train:
    return trained(launch, tmp_path_factory)


@pytest.mark.parametrize(
    ("case", "configuration"), [*((case, "zero2") for case in CASES), *((case, "zero3") for case in POLICY_GRADIENT)]
)
def test_two_processes_give_the_numbers_of_one(case: str, configuration: str, train: Train) -> None:
    assert_same_numbers(train, case, configuration)


@pytest.mark.parametrize(
    ("configuration", "method"),
    [("zero2", [*METHODS["sdft"], "teacher/weights=ema"]), ("zero3", [*METHODS["grpo"], "beta=0"])],
)
def test_an_interrupted_run_continues(configuration: str, method: list[str], launch: Launcher, tmp_path: Path) -> None:
    environment, overrides = accelerated.environment(configuration), [*COMMON, *method, *ROWS]
    whole = launch(overrides, tmp_path / "whole", environment=environment)
    assert whole.code == 0, whole.terminal
    incident = "1 1 os.kill(os.getpid(), signal.SIGTERM)"
    launch(overrides, tmp_path / "cut", incident=incident, environment=environment)
    run = only_run(tmp_path / "cut")
    assert summary(run)["status"] == "interrupted"
    again = launch([f"resume={run}"], tmp_path / "cut", environment=environment)
    assert again.code == 0, again.terminal
    assert gathered(run) == gathered(only_run(tmp_path / "whole"))


@pytest.mark.parametrize(("method", "key"), [("sdft", "teacher"), ("grpo", "beta"), ("sft", "cross_entropy_weight")])
def test_what_reads_divided_weights_is_refused(method: str, key: str, launch: Launcher, tmp_path: Path) -> None:
    overrides = [*COMMON, *METHODS.get(method, [f"experiment={method}"]), *ROWS]
    done = launch(overrides, tmp_path, environment=accelerated.environment("zero3"))
    assert done.code != 0
    said = " ".join(done.terminal.split())
    assert f"selfdistill: {key}" in said
    assert "Train with FSDP2" in said
