"""Runs that are killed, stopped or fail, and are resumed: they end with the numbers of an unbroken run."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file

from selfdistill import train
from selfdistill.config.conf import CONF
from selfdistill.errors import UserError
from selfdistill.runs.session import whole_checkpoint
from selfdistill.training.checkpoints import mark, newest_checkpoint
from tests.saboteur import VARIABLE

ROOT = Path(__file__).parents[2]
COMMON = [
    "reward=none", "+reward._target_=tests.saboteur.Saboteur", "trusted_prefixes=[tests]", "data=jsonl",
    "logger=none", "monitors=default", "training.checkpoint_every=5", "num_generations=2",
    "hardware=cpu", "hardware.per_device_batch_size=4", "hardware.accumulation_steps=2", "hardware.threads=1",
    "rollout.max_completion_tokens=8", "learning_rate=0.003",
]  # fmt: skip
# The checkpoint of step 5 lies within a pass over the data, in the first two runs not the first one, and in the second
# and third run amid the steps that share rollouts. The first run evaluates on the way.
RUNS = {
    "grpo_with_kl": [
        "max_steps=10", "beta=0.04", "eval.every=4", "eval.max_rows=6", "eval.max_new_tokens=8",
        "eval.max_rows_per_suite=2",
    ],
    "teacher_average": [
        "max_steps=10", "eval=none", "teacher=demonstration", "teacher/weights=ema", "teacher.weights.rate=0.2",
        "teacher.weights.cadence=rollout", "policy_weight=0.5", "beta=0", "rollout.on_policy_fraction=0.7",
        "rollout.cross_entropy_weight=0.5", "+training.arguments.steps_per_generation=8",
    ],
    "adapter": [
        "max_steps=10", "eval=none", "model.tuning=lora", "model.lora.r=4", "model.lora.dropout=0.2", "beta=0.04",
        "training.num_iterations=2", "teacher=feedback", "policy_weight=1.0", "training.loss_type=dapo",
    ],
    "epochs_and_best": [
        "epochs=2.5", "beta=0", "keep_best=eval/accuracy", "eval.every=2", "eval.max_rows=6",
        "eval.max_new_tokens=8", "eval.max_rows_per_suite=2",
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
        # The job of a sweep would print the error and exit.
        patch.setattr(train.sweep, "job", lambda _: nullcontext(train.sweep.ThisJob()))
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize(("name", "step"), [("grpo_with_kl", 6), ("teacher_average", 8)])
def test_failed_and_resumed(
    name: str, step: int, unbroken: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in a reward: one message that says where the traceback is; the run goes on at the very step.

    The averaged teacher has moved by the time that the reward fails, and does not move twice. Its step begins an epoch.
    """
    reference = unbroken(name)
    monkeypatch.setenv(VARIABLE, "fail:6")
    message = rf"ValueError: out of luck \(saboteur.py:\d+\).*error.txt\. To go on after step {step}: .*resume="
    with pytest.raises(UserError, match=message):
        here(overrides(name, data, tmp_path))
    run = only_run(tmp_path)
    assert status(run) == "failed"
    assert json.loads((run / "summary.json").read_text())["step"] == step
    assert newest_checkpoint(run) == run / "checkpoints" / f"checkpoint-{step}"
    assert "ValueError: out of luck" in (run / "error.txt").read_text()
    monkeypatch.delenv(VARIABLE)
    here([f"resume={run}", GRANT])
    assert_same_end(run, reference)
    assert not (run / "error.txt").exists()


@pytest.mark.long
def test_killed_before_the_first_checkpoint(
    unbroken: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts again, without evaluating the start once more."""
    reference = unbroken("grpo_with_kl")
    monkeypatch.setenv(VARIABLE, "fail:0")
    with pytest.raises(UserError, match="To go on at step 0, since there is no checkpoint yet: .*resume="):
        here(overrides("grpo_with_kl", data, tmp_path))
    run = only_run(tmp_path)
    assert not list((run / "checkpoints").glob("checkpoint-*"))
    (run / "prompts.md").unlink(missing_ok=True)  # as a kill before step 1 leaves the run
    monkeypatch.delenv(VARIABLE)
    here([f"resume={run}", GRANT])
    assert (run / "prompts.md").read_bytes() == (reference / "prompts.md").read_bytes()
    assert_same_end(run, reference)


@pytest.fixture
def copied(unbroken: Any, tmp_path: Path) -> Any:
    def copy(run: str) -> Path:
        return shutil.copytree(unbroken(run), tmp_path / "copy" / unbroken(run).name)

    return copy


def killed_at_its_end(run: Path) -> None:
    """As a kill after the last step leaves it: the checkpoint of that step is whole, and nothing came after it."""
    summary = json.loads((run / "summary.json").read_text())
    before = {"before": summary["eval"]["before"]} if "eval" in summary else None
    (run / "summary.json").write_text(json.dumps({**summary, "status": "running", "eval": before}))
    shutil.rmtree(run / "model")


@pytest.mark.long
def test_a_checkpoint_without_the_teacher_is_refused(copied: Any) -> None:
    run = copied("teacher_average")
    (run / "checkpoints" / "checkpoint-10" / "teacher.safetensors").unlink()
    mark(run / "checkpoints" / "checkpoint-10")
    with pytest.raises(UserError, match=r"no teacher.safetensors: it was written without this teacher"):
        here([f"resume={run}", GRANT, "max_steps=12"])


def test_a_run_that_has_taken_all_its_steps_goes_straight_to_its_end(
    copied: Any, unbroken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied("grpo_with_kl")
    killed_at_its_end(run)
    monkeypatch.setenv(VARIABLE, "fail:0")  # if anything were generated
    here([f"resume={run}", GRANT])
    assert_same_end(run, unbroken("grpo_with_kl"))
    ends = [json.loads((folder / "summary.json").read_text())["eval"] for folder in (run, unbroken("grpo_with_kl"))]
    without_times = [
        {when: {k: v for k, v in metrics.items() if not k.startswith(TIMES)} for when, metrics in end.items()}
        for end in ends
    ]
    assert without_times[0] == without_times[1]


@pytest.mark.long
def test_a_finished_run_is_refused_or_given_more_steps(copied: Any) -> None:
    run = copied("adapter")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"is finished: all of its 10 steps are trained.* max_steps=20"):
        here([f"resume={run}", GRANT])
    with pytest.raises(UserError, match=r"max_steps=4: .* has trained 10 steps already"):
        here([f"resume={run}", GRANT, "max_steps=4"])
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    here([f"resume={run}", GRANT, "max_steps=11"])
    assert [line["step"] for line in numbers(run)][-1] == 11
    assert OmegaConf.load(run / "config.yaml").max_steps == 11  # which a resume after a kill goes by
    samples = [json.loads(line)["step"] for line in (run / "completions.jsonl").read_text().splitlines()]
    assert set(samples) == {1, 11}  # as an unbroken run: the first step and the last


@pytest.mark.long
def test_a_run_that_has_made_all_its_epochs_is_refused_or_given_more(copied: Any) -> None:
    run = copied("epochs_and_best")
    with pytest.raises(UserError, match=r"is finished: all of its 10 steps are trained.* epochs=5.0$"):
        here([f"resume={run}", GRANT, "epochs=2.5"])
    with pytest.raises(UserError, match=r"is finished"):  # a budget only takes away
        here([f"resume={run}", GRANT, "budget_s=1000"])
    here([f"resume={run}", GRANT, "epochs=3"])
    assert [line["step"] for line in numbers(run)][-1] == 12


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "model.safetensors", "rollouts-0.pt", "complete"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    name: str, copied: Any, unbroken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied("grpo_with_kl")
    killed_at_its_end(run)
    file = run / "checkpoints" / "checkpoint-10" / name
    file.write_bytes(bytes(file.stat().st_size))
    found, notes = whole_checkpoint(run)
    assert found == run / "checkpoints" / "checkpoint-5"
    assert f"checkpoint-10 is damaged: {name}" in notes[0]
    assert notes[1] == "the run goes on from checkpoint-5, the newest whole checkpoint"
    assert whole_checkpoint(run) == (found, [])  # said once
    if name == "rng_state.pth":
        here([f"resume={run}", GRANT])
        assert_same_end(run, unbroken("grpo_with_kl"))
        assert not list(run.glob("checkpoints/*/damaged"))


def test_no_checkpoint_at_all_is_said(tmp_path: Path) -> None:
    assert whole_checkpoint(tmp_path) == (None, ["the run has no checkpoint yet: it starts again at step 0"])


def test_no_whole_checkpoint_is_said(copied: Any) -> None:
    run = copied("grpo_with_kl")
    killed_at_its_end(run)
    for checkpoint in (run / "checkpoints").glob("checkpoint-*"):
        (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(UserError, match=r"none of its checkpoints is whole \(checkpoint-10: scheduler.pt is missing"):
        here([f"resume={run}", GRANT])


@pytest.mark.long
def test_prompts_of_the_first_step(unbroken: Any) -> None:
    """What student and teacher saw, as text, and that both scored the ids that were sampled."""
    page = (unbroken("adapter") / "prompts.md").read_text()
    taught = (unbroken("teacher_average") / "prompts.md").read_text()
    assert "The student's prompt" in page and "<|user|>add" in page
    assert "An example of a good response" in taught and "The teacher scored the same token ids" in taught
    assert "OTHER" not in page + taught
