"""Runs whose completions a vLLM engine samples in the training process, from their first line to their last."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

import tests.command
from selfdistill import train
from tests.command import command, options
from tests.fuzz.forks import Trial, forked
from tests.saboteur import VARIABLE
from tests.vllm.conftest import NAME, ROOT, VllmServer

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("eager")]
COMMON = [
    "eval=none", "logger=none", "hardware=cpu", "hardware.threads=1", "training.checkpoint_every=0",
]  # fmt: skip
COLOCATED = [*COMMON, "hardware.vllm.mode=colocate"]
# Student and sampler differ in precision alone: vLLM takes a model of 32 bits in 16.
ROUNDING = 0.05  # nats


class Terminal(io.StringIO):
    """What is printed, with the descriptor that vLLM turns off for a while."""

    def fileno(self) -> int:
        return 2


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests.command.io, "StringIO", Terminal)


def run(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], Trial]:
    """The metrics of every step of a run that finishes, and what it printed.

    It runs in a fork, since a process keeps more than a GiB of every engine that it has had.
    """

    def work() -> None:
        sys.argv = ["selfdistill", *overrides]
        train.main()

    folder.mkdir(exist_ok=True)
    trial = forked(work, folder, limit_s=600)
    assert trial.code == 0, trial.err[-3000:]
    return steps(folder), trial


def steps(folder: Path) -> list[dict[str, Any]]:
    (metrics,) = (folder / "outputs").glob("*/metrics.jsonl")
    return logged(metrics)


def logged(metrics: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(
    "experiment", [name for name in options("experiment") if name not in ("sdft_server", "continual")]
)
def test_every_experiment_takes_two_steps(experiment: str, tmp_path: Path) -> None:
    two, _ = run(tmp_path, *COLOCATED, f"experiment={experiment}", "max_steps=2")
    assert len(two) == 2
    assert all(math.isfinite(step["loss"]) and step["monitor/grad_norm"] > 0 for step in two)
    assert all(step["monitor/sampler_gap"] < ROUNDING for step in two)


def test_each_task_of_a_sequence_has_an_engine(tmp_path: Path) -> None:
    """Two steps of each task, one after the other in one process; an engine has the weights of the tasks before."""
    without = [override for override in COLOCATED if override != "eval=none"]
    few = ["eval.max_rows=4", "eval.max_rows_per_suite=1"]
    run(tmp_path, *without, *few, "experiment=continual", "max_steps=2")
    stages = sorted((tmp_path / "outputs").glob("*/*/metrics.jsonl"))
    assert len(stages) == 3
    for stage in stages:
        two = logged(stage)
        assert len(two) == 2
        assert all(step["monitor/sampler_gap"] < ROUNDING for step in two)


def test_the_experiment_with_a_served_teacher_takes_two_steps(server: VllmServer, tmp_path: Path) -> None:
    served = [f"teacher.base_url={server.url}", f"teacher.model={NAME}"]
    two, _ = run(tmp_path, *COLOCATED, "experiment=sdft_server", *served, "max_steps=2")
    assert all(step["distill/divergence"] > 0 and step["monitor/sampler_gap"] < ROUNDING for step in two)


@pytest.mark.parametrize("experiment", ["grpo_supervised", "sdpo_feedback"])
def test_ten_steps_are_rewarded_as_those_that_transformers_samples(experiment: str, tmp_path: Path) -> None:
    """Both see the same prompts in the same order; what differs is the sampling's noise."""
    ten = [f"experiment={experiment}", "max_steps=10", "completions_per_step=64"]
    ours = [step["reward"] for step in run(tmp_path / "vllm", *COLOCATED, *ten)[0]]
    theirs = [step["reward"] for step in run(tmp_path / "transformers", *COMMON, *ten)[0]]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    # Student's t with nine degrees of freedom is above 4.78 one time in a thousand.
    assert abs(fmean(differences)) < 4.78 * stdev(differences) / math.sqrt(10)
    assert stdev(ours) > 0


def test_a_sampler_that_is_left_behind_raises_the_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    hasty = ["experiment=sdpo_feedback", "max_steps=6", "learning_rate=1e-3"]
    followed, outcome = run(tmp_path / "followed", *COLOCATED, *hasty)
    assert all(step["monitor/sampler_gap"] < 0.1 for step in followed)
    assert "sampler_gap" not in outcome.out + outcome.err
    monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: None)
    left, outcome = run(tmp_path / "left", *COLOCATED, *hasty)
    assert left[-1]["monitor/sampler_gap"] > 0.1
    assert "sampler_gap" in outcome.out + outcome.err


def test_a_killed_run_is_resumed(tmp_path: Path) -> None:
    """From its checkpoint with the numbers of an unbroken one; a new engine may sample otherwise from there on."""
    six = [
        *COLOCATED, "num_generations=2", "training.checkpoint_every=3", "max_steps=6", "reward=none", "beta=0.04",
        "+reward._target_=tests.saboteur.Saboteur", "trusted_prefixes=[tests]", "model.tuning=lora", "model.lora.r=4",
    ]  # fmt: skip
    unbroken, _ = run(tmp_path / "unbroken", *six)
    folder = tmp_path / "killed"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", VARIABLE: "kill:4"}
    words = [sys.executable, "-m", "tests.vllm.eager", *six]
    killed = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr[-3000:]
    (broken,) = (folder / "outputs").iterdir()
    resumed, _ = run(folder, f"resume={broken}", "trusted_prefixes=[tests]")
    assert [step["step"] for step in resumed] == list(range(1, 7))
    for name in ("reward", "loss", "kl"):
        found, expected = ([step[name] for step in curve[:3]] for curve in (resumed, unbroken))
        assert found == pytest.approx(expected, rel=1e-6), name
    assert all(math.isfinite(step["loss"]) and step["monitor/sampler_gap"] < ROUNDING for step in resumed)
    assert json.loads((broken / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hardware.vllm.standby=true", ["hardware.vllm.mode=colocate", "Sleep mode is not supported"]),
        ("hardware.vllm.mode=server hardware.vllm.server_base_url=http://127.0.0.1:1", ["server", "needs a GPU"]),
    ],
)
def test_what_vllm_refuses_is_said(override: str, words: list[str], tmp_path: Path) -> None:
    outcome = command([*COLOCATED, *override.split(), "max_steps=1"], tmp_path)
    assert outcome.code != 0
    assert all(word in outcome.err for word in words), outcome.err[-2000:]
    assert "Traceback" not in outcome.err
