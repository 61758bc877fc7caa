"""Every launcher gives the same numbers, and a job that a scheduler takes off its machine goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reference import ROOT

pytestmark = pytest.mark.long

SWEEP = [
    "--multirun", "experiment=sdpo", "seed=1,2", "alpha=0,1", "hardware=cpu", "completions_per_step=8", "max_steps=2",
    "logger=none", "num_generations=4", "eval.max_rows=8", "eval.max_rows_per_suite=4",
    "rollout.max_completion_tokens=8", "training.checkpoint_every=1",
]  # fmt: skip
# Values that a clock or the machine's memory gives.
MEASURED = ("time/", "memory", "speed")
LAUNCHERS = {
    "one after the other": ["hydra/launcher=basic"],
    "processes": ["hydra.launcher.n_jobs=2"],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=slurm_local"],
}


def train(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "selfdistill.train", *arguments, "hydra.sweep.dir=sweep"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def latest(folder: Path) -> dict[int, dict]:
    return {job["job"]: job for job in map(json.loads, (folder / "sweep" / "jobs.jsonl").read_text().splitlines())}


def metrics(folder: Path, job: dict) -> list[dict]:
    lines = [json.loads(line) for line in (folder / job["run"] / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(MEASURED)} for line in lines]


def test_every_launcher_gives_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    found = {}
    for number, (name, launcher) in enumerate(LAUNCHERS.items()):
        sweep = train(folder := tmp_path / str(number), *SWEEP, *launcher)
        printed, _ = sweep.communicate(timeout=500)
        assert sweep.returncode == 0, f"{name}: {printed}"
        jobs = latest(folder)
        assert [job["status"] for job in jobs.values()] == ["finished"] * 4
        found[name] = [metrics(folder, jobs[number]) for number in range(4)]
        assert [len(lines) for lines in found[name]] == [3] * 4
    assert found["one after the other"][0] != found["one after the other"][1]
    for name in LAUNCHERS:
        assert found[name] == found["one after the other"], name


def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    """submitit sends SIGUSR2 to a job that is to leave its machine."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    reward = """
import os, time
from pathlib import Path
def score(completions, **columns):
    Path(f"process-{os.getpid()}").touch()
    time.sleep(0.3)
    return [float(len(completion[0]["content"])) for completion in completions]
"""
    (tmp_path / "slow_reward.py").write_text(reward)
    keys = ["reward=function", "reward._target_=slow_reward.score", "trusted_prefixes=[slow_reward]", "eval=none"]
    sizes = ["max_steps=12", "completions_per_step=4", "hardware=cpu", "logger=none", "hydra/launcher=slurm_local"]
    sweep = train(tmp_path, "--multirun", "seed=1", *keys, *sizes)
    until = time.monotonic() + 240
    while not (marks := list(tmp_path.glob("process-*"))) and sweep.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.1)
    time.sleep(1)
    os.kill(int(marks[0].name.removeprefix("process-")), signal.SIGUSR2)
    printed, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, printed
    assert len(list(tmp_path.glob("process-*"))) == 2
    (job,) = latest(tmp_path).values()
    summary = json.loads((tmp_path / job["run"] / "summary.json").read_text())
    assert (job["status"], summary["status"], len(summary["resumed"])) == ("finished", "finished", 1)
    assert [line["step"] for line in metrics(tmp_path, job)] == list(range(1, 13))
    statuses = [json.loads(line)["status"] for line in (tmp_path / "sweep" / "jobs.jsonl").read_text().splitlines()]
    assert statuses == ["waiting", "running", "interrupted", "running", "finished"]
