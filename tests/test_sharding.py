"""A model whose parameters FSDP2 divides among two processes: the numbers of one process, whoever teaches."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import accelerated
from tests.launched import Launcher
from tests.sharded import CASES, WEIGHTS, Train, assert_same_numbers, trained
from tests.test_processes import COMMON, gathered, only_run, summary

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def train(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Train:
    return trained(launch, tmp_path_factory)


# Under DDP in full: tests/test_processes.py.
WITH_LORA = ("grpo with lora", "the start teaches an adapter", "sdpo_feedback with lora")


@pytest.mark.parametrize(
    ("case", "configuration"), [*((case, "ddp") for case in WITH_LORA), *((case, "fsdp2") for case in CASES)]
)
def test_two_processes_give_the_numbers_of_one(case: str, configuration: str, train: Train) -> None:
    assert_same_numbers(train, case, configuration)


@pytest.mark.parametrize("tuning", WEIGHTS)
def test_an_interrupted_run_continues_with_the_teachers_shards(tuning: str, launch: Launcher, tmp_path: Path) -> None:
    environment = accelerated.environment("fsdp2")
    rows = ["completions_per_step=16", "hardware.per_device_batch_size=8", "logger=none"]
    # torch cannot load the sharded state of an optimizer that has none, such as plain SGD
    common = [override.replace("optim=sgd", "optim=adamw_torch") for override in COMMON]
    overrides = [*common, "experiment=sdft", "teacher/weights=ema", f"model.tuning={tuning}", *rows]
    whole = launch(overrides, tmp_path / "whole", environment=environment)
    assert whole.code == 0, whole.terminal
    incident = "1 1 os.kill(os.getpid(), signal.SIGTERM)"
    launch(overrides, tmp_path / "cut", incident=incident, environment=environment)
    run = only_run(tmp_path / "cut")
    assert summary(run)["status"] == "interrupted"
    (checkpoint,) = (run / "checkpoints").glob("checkpoint-*")
    shards = [load_file(checkpoint / f"teacher-{process}.safetensors") for process in range(2)]
    whole_weights = load_file(checkpoint / WEIGHTS[tuning])
    trained = sum(t.numel() for t in whole_weights.values())
    assert sum(t.numel() for shard in shards for t in shard.values()) == trained
    again = launch([f"resume={run}"], tmp_path / "cut", environment=environment)
    assert again.code == 0, again.terminal
    assert gathered(run) == gathered(only_run(tmp_path / "whole"))


UNEVEN = {
    "distillation as an advantage": [
        "experiment=sdpo_feedback", "distillation.signal=advantage", "policy_weight=1", "rollout.temperature=0.7",
    ],
    "a reward that asks the policy about some rows": [
        "experiment=grpo_supervised", "reward=answer_likelihood", "reward.delimiter=e", "reward.missing_delimiter=zero",
    ],
    "demonstrations in the place of some completions": ["experiment=gkd", "num_generations=1"],
}  # fmt: skip


@pytest.mark.parametrize("case", UNEVEN)
def test_every_process_makes_as_many_passes(case: str, launch: Launcher, tmp_path: Path) -> None:
    """However many of its own rows need one: a pass of a sharded model takes all processes, and would wait for ever."""
    rows = ["completions_per_step=16", "hardware.per_device_batch_size=1", "model.tuning=lora", "logger=none"]
    environment = {**accelerated.environment("fsdp2"), "COUNT_PASSES": "true"}
    done = launch([*COMMON, *UNEVEN[case], *rows], tmp_path, environment=environment)
    assert done.code == 0, done.terminal
    passes = [json.loads((tmp_path / f"passes-{process}").read_text()) for process in range(2)]
    assert passes[0] == passes[1] > 0


def test_the_export_of_a_sharded_run_is_the_whole_model(train: Train) -> None:
    """That of the same run in one process, which is exported from the model in memory."""
    (_, one), (_, two) = (train("the start teaches an adapter", configuration) for configuration in (None, "fsdp2"))
    (expected,), (found,) = (run.glob("export/*/model.safetensors") for run in (one, two))
    one_bit = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(load_file(found), load_file(expected), rtol=one_bit, atol=1e-5)


def test_model_holds_whole_weights_where_checkpoints_are_sharded(launch: Launcher, tmp_path: Path) -> None:
    environment = {**accelerated.environment("fsdp2"), "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    rows = ["completions_per_step=16", "hardware.per_device_batch_size=8", "logger=none", "max_steps=1"]
    done = launch([*COMMON, "experiment=sdft", "model.tuning=full", *rows], tmp_path, environment=environment)
    assert done.code == 0, done.terminal
    assert load_file(only_run(tmp_path) / "model" / WEIGHTS["full"])["model.embed_tokens.weight"].dim() == 2


def test_sharding_on_a_cpu_is_refused(launch: Launcher, tmp_path: Path) -> None:
    """torch shards there, accelerate does not."""
    environment = {**accelerated.environment("fsdp2"), "FSDP_AS_IT_IS": "true"}
    done = launch([*COMMON, "experiment=sdft", "logger=none"], tmp_path, environment=environment)
    assert done.code != 0
    assert "FSDP needs GPUs" in " ".join(done.terminal.split())
