"""A model whose parameters FSDP2 divides among two processes: the numbers of one process, whoever teaches."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import accelerated
from tests.launched import Launch, Launcher
from tests.test_processes import COMMON, METHODS, ROWS, gathered, only_run, summary

pytestmark = pytest.mark.long

WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
SEVERAL_PASSES = "hardware.per_device_batch_size=2"
# TRL logs the mean of the passes' means over tokens, and a pass has other rows where there are two processes.
MEANS_OF_PASSES = {"kl", "monitor/entropy"}
# Each method and each way of training; every copy of the student as the teacher; and what else takes passes.
CASES = {
    "grpo in full": ["grpo", "model.tuning=full"],
    "sdpo_feedback with lora": ["sdpo_feedback", "model.tuning=lora"],
    "the start teaches an adapter": ["sdft", "model.tuning=lora", "export=merged_16bit"],
    "an average teaches": ["sdft", "model.tuning=full", "teacher/weights=ema"],
    "a copy teaches, and samples": [
        "sdft", "model.tuning=full", "teacher/weights=copy", "teacher.weights.every=1", "rollout.from_teacher=true",
    ],
    "a mixture teaches, beside a reward and a reference, in several passes to a step": [
        "sdft", "model.tuning=full", "teacher/weights=trust_region", "beta=0.1", "reward=exact_match",
        "policy_weight=0.5", SEVERAL_PASSES,
    ],
}  # fmt: skip
Train = Callable[..., tuple[Launch, Path]]


@pytest.fixture(scope="module")
def launch() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def train(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A case's run with the same global batch in one process or in two; made once."""
    made: dict[tuple[str, str | None], tuple[Launch, Path]] = {}

    def get(case: str, configuration: str | None) -> tuple[Launch, Path]:
        if (case, configuration) not in made:
            method, *more = CASES[case]
            folder, processes = tmp_path_factory.mktemp("run"), 2 if configuration else 1
            rows = [
                f"completions_per_step={ROWS[method]}",
                f"hardware.per_device_batch_size={ROWS[method] // processes}",
            ]
            environment = accelerated.environment(configuration) if configuration else {}
            overrides = [*COMMON, *METHODS[method], "logger=none", *rows, *more]
            done = launch(overrides, folder, processes, environment=environment)
            assert done.code == 0, done.terminal
            made[case, configuration] = done, only_run(folder)
        return made[case, configuration]

    return get


@pytest.mark.parametrize(
    ("case", "configuration"), [("the start teaches an adapter", "ddp"), *((case, "fsdp2") for case in CASES)]
)
def test_two_processes_give_the_numbers_of_one(case: str, configuration: str, train: Train) -> None:
    """Losses, gradients, rewards and evaluation; and the saved model has whole weights."""
    (_, one), (done, two) = train(case, None), train(case, configuration)
    expected, found = gathered(one), gathered(two)
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [0, 1, 2, 3]
    assert all(line["monitor/grad_norm"] > 0.1 for line in expected[1:])
    apart = MEANS_OF_PASSES if SEVERAL_PASSES in CASES[case] else set()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        same = {name: value for name, value in theirs.items() if name not in apart}
        assert {name: ours[name] for name in same} == pytest.approx(same, rel=1e-3, abs=1e-5)
    file = WEIGHTS["lora" if "model.tuning=lora" in CASES[case] else "full"]
    ours, theirs = load_file(two / "model" / file), load_file(one / "model" / file)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert "find_unused_parameters" not in done.terminal
    assert summary(two)["status"] == "finished"


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
