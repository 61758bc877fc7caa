"""Runs that are killed, stopped or fail, and are resumed: they end with the numbers of an unbroken run."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from safetensors.torch import load_file

from selfdistill import train
from selfdistill.config.conf import CONF
from selfdistill.errors import UserError
from tests.saboteur import VARIABLE

ROOT = Path(__file__).parents[2]
COMMON = [
    "reward=none", "+reward._target_=tests.saboteur.Saboteur", "trusted_prefixes=[tests]", "data=jsonl",
    "logger=none", "monitors=default", "max_steps=10", "training.checkpoint_every=5", "num_generations=2",
    "hardware=cpu", "hardware.per_device_batch_size=4", "hardware.accumulation_steps=2", "hardware.threads=1",
    "rollout.max_completion_tokens=8", "learning_rate=0.003",
]  # fmt: skip
# The checkpoint of step 5 lies within a pass over the data, in the first two runs not the first one, and in the second
# and third run amid the steps that share rollouts. The first run evaluates on the way.
RUNS = {
    "grpo_with_kl": [
        "beta=0.04", "eval.every=4", "eval.max_rows=6", "eval.max_new_tokens=8", "eval.max_rows_per_suite=2",
    ],
    "teacher_average": [
        "eval=none", "teacher=demonstration", "teacher/weights=ema", "teacher.weights.rate=0.2",
        "teacher.weights.cadence=rollout", "policy_weight=0.5", "beta=0", "rollout.on_policy_fraction=0.7",
        "rollout.cross_entropy_weight=0.5", "+training.arguments.steps_per_generation=8",
    ],
    "adapter": [
        "eval=none", "model.tuning=lora", "model.lora.r=4", "model.lora.dropout=0.2", "beta=0.04",
        "training.num_iterations=2", "teacher=feedback", "policy_weight=1.0", "training.loss_type=dapo",
    ],
}  # fmt: skip
GRANT = "trusted_prefixes=[tests]"  # the saboteur is no module of ours
TIMES = ("time/", "step_time", "eval_runtime")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": f"add {i} {i + 1}", "answer": str(2 * i + 1), "golden_response": [f"it is {2 * i + 1}"]}
        for i in range(18)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _unharmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def overrides(run: str, data: Path, folder: Path) -> list[str]:
    paths = [f"data.path={data}", f"data.eval_path={data}", f"output_dir={folder}"]
    return [*COMMON, *RUNS[run], *paths]


def here(arguments: list[str]) -> None:
    """`python -m selfdistill.train` in this process."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", arguments, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train.sweep, "job", lambda _: nullcontext(SimpleNamespace())
        )  # which would print the error and exit
        train.run(cfg)


def command(arguments: list[str], sabotage: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    if sabotage:
        environment[VARIABLE] = sabotage
    return subprocess.run(
        [sys.executable, "-m", "selfdistill.train", *arguments], env=environment, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


def only_run(folder: Path) -> Path:
    (run,) = [path for path in folder.iterdir() if (path / "summary.json").exists()]
    return run


def status(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["status"]


def numbers(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def assert_same_end(ours: Path, theirs: Path) -> None:
    assert status(ours) == status(theirs) == "finished"
    assert [line["step"] for line in numbers(theirs) if "loss" in line] == list(range(1, 11))
    assert numbers(ours) == numbers(theirs)
    for name in ("model", "checkpoints/checkpoint-10"):
        files = sorted(path.name for path in (theirs / name).glob("*.safetensors"))
        assert files and files == sorted(path.name for path in (ours / name).glob("*.safetensors"))
        for file in files:
            torch.testing.assert_close(load_file(ours / name / file), load_file(theirs / name / file), rtol=0, atol=0)


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each run without any incident, made once."""
    made: dict[str, Path] = {}

    def get(run: str) -> Path:
        if run not in made:
            folder = tmp_path_factory.mktemp(run)
            here(overrides(run, data, folder))
            made[run] = only_run(folder)
        return made[run]

    return get


@pytest.mark.parametrize("run", RUNS)
def test_killed_and_resumed(run: str, unbroken: Any, data: Path, tmp_path: Path) -> None:
    reference = unbroken(run)
    killed = command(overrides(run, data, tmp_path), sabotage="kill:6")
    assert killed.returncode == -9, killed.stderr
    broken = only_run(tmp_path)
    assert status(broken) == "running"
    assert 5 < max(line["step"] for line in numbers(broken)) < 10
    here([f"resume={broken}", GRANT])
    assert_same_end(broken, reference)


def test_terminated_and_resumed(unbroken: Any, data: Path, tmp_path: Path) -> None:
    """SIGTERM: the step ends, a checkpoint is saved, and the exit code is that of a terminated process."""
    reference = unbroken("grpo_with_kl")
    ended = command([*overrides("grpo_with_kl", data, tmp_path), "logger=wandb"], sabotage="term:6")
    run = only_run(tmp_path)
    assert ended.returncode == 143, ended.stderr
    assert "Traceback" not in ended.stderr
    assert status(run) == "interrupted"
    assert (run / "checkpoints" / "checkpoint-7" / "complete").exists()
    assert max(line["step"] for line in numbers(run)) == 7
    again = command([f"resume={run}", GRANT])
    assert again.returncode == 0, again.stderr
    assert_same_end(run, reference)
    # One W&B run, whose id is the folder's name, in a folder for each time that it was started.
    parts = sorted(path.name for path in (run / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(name.endswith(f"-{run.name}") for name in parts)


def test_failed_and_resumed(unbroken: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a reward: one message that says where the traceback is; the run can go on from its checkpoint."""
    reference = unbroken("grpo_with_kl")
    monkeypatch.setenv(VARIABLE, "fail:6")
    with pytest.raises(UserError, match=r"ValueError: out of luck \(saboteur.py:\d+\).*error.txt.*resume="):
        here(overrides("grpo_with_kl", data, tmp_path))
    run = only_run(tmp_path)
    assert status(run) == "failed"
    assert "ValueError: out of luck" in (run / "error.txt").read_text()
    monkeypatch.delenv(VARIABLE)
    here([f"resume={run}", GRANT])
    assert_same_end(run, reference)
    assert not (run / "error.txt").exists()


def test_killed_before_the_first_checkpoint(
    unbroken: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts again, without evaluating the start once more."""
    reference = unbroken("grpo_with_kl")
    monkeypatch.setenv(VARIABLE, "fail:2")
    with pytest.raises(UserError):
        here(overrides("grpo_with_kl", data, tmp_path))
    run = only_run(tmp_path)
    assert not list((run / "checkpoints").glob("checkpoint-*"))
    monkeypatch.delenv(VARIABLE)
    here([f"resume={run}", GRANT])
    assert_same_end(run, reference)


def test_a_checkpoint_without_the_teacher_is_refused(unbroken: Any, tmp_path: Path, data: Path) -> None:
    run = unbroken("teacher_average")
    teacher = run / "checkpoints" / "checkpoint-10" / "teacher.safetensors"
    hidden = teacher.rename(tmp_path / "teacher.safetensors")
    try:
        with pytest.raises(UserError, match=r"no teacher.safetensors: it was written without this teacher"):
            here([f"resume={run}", GRANT, "max_steps=12"])
    finally:
        hidden.rename(teacher)


def test_prompts_of_the_first_step(unbroken: Any) -> None:
    """What student and teacher saw, as text, and that both scored the ids that were sampled."""
    page = (unbroken("adapter") / "prompts.md").read_text()
    taught = (unbroken("teacher_average") / "prompts.md").read_text()
    assert "The student's prompt" in page and "<|user|>add" in page
    assert "An example of a good response" in taught and "The teacher scored the same token ids" in taught
    assert "OTHER" not in page + taught
