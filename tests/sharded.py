"""Runs whose optimizer, gradients or weights are divided among two processes, beside the same run in one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import accelerated
from tests.launched import Launch, Launcher
from tests.test_processes import COMMON, METHODS, ROWS, gathered, only_run, summary

WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
SEVERAL_PASSES = "hardware.per_device_batch_size=2"
# TRL logs the mean of the passes' means over tokens, and a pass has other rows where there are two processes.
MEANS_OF_PASSES = {"kl", "monitor/entropy"}
# Each method and each way of training; every copy of the student as the teacher; and what else takes passes.
CASES = {
    "grpo in full": ["grpo", "model.tuning=full"],
    "grpo in full, without a reference": ["grpo", "model.tuning=full", "beta=0"],
    "grpo with lora": ["grpo", "model.tuning=lora"],
    "sdpo_feedback in full": ["sdpo_feedback", "model.tuning=full"],
    "sdpo_feedback with lora": ["sdpo_feedback", "model.tuning=lora"],
    "the start teaches an adapter": ["sdft", "model.tuning=lora", "export=merged_16bit"],
    "an average teaches": ["sdft", "model.tuning=full", "teacher/weights=ema"],
    "a copy teaches, and samples": [
        "sdft", "model.tuning=full", "teacher/weights=copy", "teacher.weights.every=1", "rollout.from_teacher=true",
    ],
    "the student itself teaches": ["sdft", "model.tuning=full", "teacher/weights=live"],
    "a mixture teaches, beside a reward and a reference, in several passes to a step": [
        "sdft", "model.tuning=full", "teacher/weights=trust_region", "beta=0.1", "reward=exact_match",
        "policy_weight=0.5", SEVERAL_PASSES,
    ],
}  # fmt: skip
Train = Callable[..., tuple[Launch, Path]]


def trained(launch: Launcher, folders: pytest.TempPathFactory) -> Train:
    """Gives a case's run with the same global batch in one process or, in a configuration, in two; made once."""
    made: dict[tuple[str, str | None], tuple[Launch, Path]] = {}

    def get(case: str, configuration: str | None) -> tuple[Launch, Path]:
        if (case, configuration) not in made:
            method, *more = CASES[case]
            folder, processes = folders.mktemp("run"), 2 if configuration else 1
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


def assert_same_numbers(train: Train, case: str, configuration: str) -> None:
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
