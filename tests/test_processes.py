"""A run in two processes: one record, the numbers of one process, and one end, whatever happens to either of them."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.launched import Launch, Launcher

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("processes")]  # one launcher, and each run made once

COMMON = [
    "hardware=cpu", "hardware.threads=1", "max_steps=3", "rollout.max_completion_tokens=8", "eval.max_rows=4",
    "eval.max_new_tokens=8", "eval.max_rows_per_suite=1", "learning_rate=0.01", "+training.arguments.optim=sgd",
]  # fmt: skip
# The groups of eight are divided among both processes.
METHODS = {
    "grpo": ["experiment=grpo_supervised", "logger=none"],
    "sdft": ["experiment=sdft", "logger=wandb"],
    "sdpo_feedback": ["experiment=sdpo_feedback", "logger=none", "rollout.temperature=0.7"],
}
ROWS = {"grpo": 16, "sdft": 16, "sdpo_feedback": 24}  # completions a step
# Names of metrics.jsonl that are taken over all processes; those that a run does not have are left out.
GATHERED = (
    "loss", "monitor/grad_norm", "reward", "reward_std", "kl", "num_tokens", "tokens/generated",
    "completions/clipped_ratio", "eval/accuracy", "eval/retention", "eval/forgetting", "monitor/entropy",
    "distill/divergence",
    "distill/active_fraction", "monitor/repetition", "monitor/distinct_2", "monitor/length_tokens",
    "monitor/reward_spread",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Launch, Path]]:
    """A method's run in one process or in two, with the same global batch; made once."""
    made: dict[tuple[str, int], tuple[Launch, Path]] = {}

    def get(method: str, processes: int) -> tuple[Launch, Path]:
        if (method, processes) not in made:
            folder = tmp_path_factory.mktemp(f"{method}-{processes}")
            done = launch(overrides(method, processes), folder, processes)
            assert done.code == 0, done.terminal
            made[method, processes] = done, only_run(folder)
        return made[method, processes]

    return get


def overrides(method: str, processes: int = 2) -> list[str]:
    batch = [f"completions_per_step={ROWS[method]}", f"hardware.per_device_batch_size={ROWS[method] // processes}"]
    return [*COMMON, *METHODS[method], *batch]


def only_run(folder: Path) -> Path:
    (run,) = (folder / "outputs").iterdir()
    return run


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def gathered(run: Path) -> list[dict[str, float]]:
    return [{"step": line["step"]} | {k: line[k] for k in GATHERED if line.get(k) is not None} for line in metrics(run)]


def assert_gone(pids: Sequence[int]) -> None:
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_numbers_of_one(method: str, trained: Callable[[str, int], tuple[Launch, Path]]) -> None:
    (_, one), (_, two) = trained(method, 1), trained(method, 2)
    expected, found = gathered(one), gathered(two)
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [0, 1, 2, 3]
    assert all(line["monitor/grad_norm"] > 0.1 for line in expected[1:])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    ours, theirs = load_file(two / "model" / "model.safetensors"), load_file(one / "model" / "model.safetensors")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_leave_one_record(method: str, trained: Callable[[str, int], tuple[Launch, Path]]) -> None:
    done, run = trained(method, 2)
    lines = [line.strip() for line in done.terminal.splitlines()]
    for once in ("differs from the defaults", "plan", "before and after", "where everything lies"):
        assert lines.count(once) == 1, done.terminal
    assert "2 processes" in done.terminal
    assert summary(run)["status"] == "finished"
    assert len(list(run.glob("wandb/offline-run-*/*.wandb"))) == (1 if "logger=wandb" in METHODS[method] else 0)
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3]
    assert (run / "prompts.md").read_text().count("# What student and teacher saw") == 1
    assert_gone(done.pids)


@pytest.mark.parametrize(
    ("number", "target"), [("SIGINT", "the launcher"), ("SIGTERM", "the launcher"), ("SIGTERM", "a process")]
)
def test_a_signal_ends_all_and_the_run_is_resumed(
    number: str, target: str, launch: Launcher, trained: Callable[[str, int], tuple[Launch, Path]], tmp_path: Path
) -> None:
    """To the launcher, or to a process that is not the main one: all save a checkpoint after the same step."""
    pid = "os.getppid()" if target == "the launcher" else "os.getpid()"
    done = launch(overrides("grpo"), tmp_path, incident=f"1 1 os.kill({pid}, signal.{number})")
    run = only_run(tmp_path)
    assert done.code != 0
    assert_gone(done.pids)
    assert summary(run)["status"] == "interrupted", done.terminal
    assert done.terminal.count("continue with: ") == 1
    (checkpoint,) = (run / "checkpoints").glob("checkpoint-*")
    assert {"complete", "rollouts-0.pt", "rollouts-1.pt"} <= {file.name for file in checkpoint.iterdir()}
    assert checkpoint.name in ("checkpoint-2", "checkpoint-3")  # a launcher may take a moment
    if (number, target) != ("SIGTERM", "the launcher"):
        return
    again = launch([f"resume={run}"], tmp_path)
    assert again.code == 0, again.terminal
    assert gathered(run) == gathered(trained("grpo", 2)[1])
    assert len(list((tmp_path / "outputs").iterdir())) == 1


def test_a_run_is_resumed_with_as_many_processes(
    launch: Launcher, trained: Callable[[str, int], tuple[Launch, Path]], tmp_path: Path
) -> None:
    _, run = trained("sdft", 2)
    refused = launch([f"resume={run}", "max_steps=4"], tmp_path, processes=1)
    assert refused.code == 2
    assert "was written by 2 processes and there are 1 now" in " ".join(refused.terminal.split())


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_all(failing: int, launch: Launcher, tmp_path: Path) -> None:
    incident = f"1 {failing} raise ValueError('out of luck')"
    done = launch(overrides("grpo"), tmp_path, incident=incident)
    run = only_run(tmp_path)
    assert done.code != 0
    assert_gone(done.pids)
    assert summary(run)["status"] == "failed"
    assert "ValueError: out of luck" in (run / "error.txt").read_text()
    assert done.terminal.count("selfdistill: the run failed: ValueError: out of luck") == 1, done.terminal
    assert "saving a checkpoint" not in done.terminal


def test_a_process_that_is_killed_ends_all(launch: Launcher, tmp_path: Path) -> None:
    incident = "1 1 os.kill(os.getpid(), signal.SIGKILL)"
    done = launch(overrides("grpo"), tmp_path, incident=incident)
    assert done.code != 0
    assert_gone(done.pids)
    assert summary(only_run(tmp_path))["status"] == "failed", done.terminal


def test_a_refused_run_leaves_nothing(launch: Launcher, tmp_path: Path) -> None:
    done = launch([*overrides("grpo"), "data=jsonl", "data.path=nowhere.jsonl"], tmp_path)
    assert done.code != 0
    assert_gone(done.pids)
    assert not (tmp_path / "outputs").exists()
    assert done.terminal.count("selfdistill: ") == 1, done.terminal


def test_several_processes_sweep_nothing(launch: Launcher, tmp_path: Path) -> None:
    done = launch([*overrides("grpo"), "--multirun", "seed=1,2"], tmp_path)
    assert done.code != 0
    assert_gone(done.pids)
    assert done.terminal.count("selfdistill: --multirun is for one process") == 1, done.terminal
    assert not (tmp_path / "outputs").exists()


def test_a_model_in_memory_is_the_reference_of_every_process(launch: Launcher, tmp_path: Path) -> None:
    """transformers lets the main process alone write the model, which all then load."""
    done = launch([], tmp_path, program="tests.in_memory")
    assert done.code == 0, done.terminal
    assert "find_unused_parameters" not in done.terminal


def test_the_others_wait_for_the_main_process_longer_than_a_collective_operation(
    launch: Launcher, tmp_path: Path
) -> None:
    done = launch([], tmp_path, program="tests.late")
    assert (done.code, done.terminal.count("over")) == (0, 2), done.terminal
