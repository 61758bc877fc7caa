"""A sweep of twelve jobs: three fail, one is killed, all are interrupted, and it goes on to the end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from html import escape
from pathlib import Path
from statistics import fmean

import pytest

from selfdistill.comparison import report
from tests.reference import ROOT

pytestmark = pytest.mark.long

REWARD = """
import os, signal, time
from pathlib import Path

def score(completions, kind="plain", seed=0, **columns):
    marks = Path("marks")
    marks.mkdir(exist_ok=True)
    if kind == "broken" and not (marks / "mended").exists():
        raise RuntimeError("the reward broke")
    if kind == "deadly" and seed == 2 and not (marks / "killed").exists():
        (marks / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "slow" and not (marks / "mended").exists():
        (marks / f"slow-{seed}").touch()
        time.sleep(0.5)
    return [float(len(completion[0]["content"])) for completion in completions]
"""
GRID = ["+reward.kind=plain,broken,deadly,slow", "seed=1,2,3", "+reward.seed=${seed}"]
FIXED = [
    "reward=function", "reward._target_=survival_reward.score", "trusted_prefixes=[survival_reward]", "eval=none",
    "logger=none", "hardware=cpu", "completions_per_step=4", "max_steps=8", "rollout.max_completion_tokens=4",
    "training.checkpoint_every=2", "hydra.sweep.dir=sweep", "hydra.launcher.n_jobs=3", "objective=reward",
]  # fmt: skip


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "selfdistill.train", *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "sweep" / "jobs.jsonl").read_text().splitlines()]


def latest(folder: Path) -> dict[int, dict]:
    return {line["job"]: line for line in lines(folder)}


def assert_reported(place: Path, jobs: list[dict]) -> None:
    """The report lists every job with its status, and the means are those of the finished ones."""
    content = json.loads((place / "report.json").read_text())
    page = (place / "report.html").read_text()
    listed = {run["run"]: run for run in content["runs"]}
    assert len(listed) == len(content["runs"]) == len(jobs)
    rewards: dict[str, list[float]] = {}
    for job in jobs:
        name = Path(job["run"]).name if job.get("run") else f"job {job['job']}"
        run = listed[name]
        # A run that was killed is entered as failed by the sweep, with the signal for a reason.
        assert run["status"] == {"killed": "failed"}.get(job["status"], job["status"])
        assert f"<td>{name}<" in page
        if job["status"] == "finished":
            kind = next(text.partition("=")[2] for text in job["overrides"] if "kind" in text)
            rewards.setdefault(kind, []).append(job["objective"])
            assert run["reward"] == pytest.approx(job["objective"])
        else:
            assert run["reason"].startswith(f"{run['status']}: ")
            said = {"failed": "RuntimeError: the reward broke", "killed": "was ended by SIGKILL"}.get(job["status"], "")
            assert said in run["reason"] and escape(run["reason"]) in page
    (field,) = content["fields"]
    means = {one["values"]["reward.kind"]: one["metrics"]["reward"]["mean"] for one in field["settings"]}
    assert means == pytest.approx({kind: fmean(values) for kind, values in rewards.items()})


def test_every_job_is_accounted_for(tmp_path: Path) -> None:
    (tmp_path / "survival_reward.py").write_text(REWARD)
    sweep = start(tmp_path, "--multirun", *FIXED, *GRID)
    until = time.monotonic() + 240
    while len(list((tmp_path / "marks").glob("slow-*"))) < 2 and sweep.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.1)
    sweep.send_signal(signal.SIGINT)
    printed, _ = sweep.communicate(timeout=240)
    assert sweep.returncode == 130, printed
    jobs = latest(tmp_path)
    assert sorted(jobs) == list(range(12))
    counts = Counter(job["status"] for job in jobs.values())
    assert counts["failed"] == 3
    assert counts["killed"] == 1
    assert counts["interrupted"] >= 2
    assert counts["finished"] == 12 - 4 - counts["interrupted"] - counts["waiting"]
    assert "go on with: python -m selfdistill.train resume_sweep=sweep 'trusted_prefixes=[survival_reward]'" in printed
    broken = next(job for job in jobs.values() if job["status"] == "failed")
    assert "the reward broke" in broken["message"]
    assert "the reward broke" in printed
    assert "the reward broke" in (tmp_path / broken["run"] / "error.txt").read_text()
    killed = next(job for job in jobs.values() if job["status"] == "killed")
    assert "SIGKILL" in (tmp_path / killed["run"] / "error.txt").read_text()
    report(tmp_path / "sweep", folder=tmp_path / "between", metric="reward")
    assert_reported(tmp_path / "between", list(jobs.values()))
    failed = [job for job in jobs.values() if job["status"] == "failed"]
    finished = {number: job for number, job in jobs.items() if job["status"] == "finished"}
    written = {n: (tmp_path / job["run"] / "summary.json").read_bytes() for n, job in finished.items()}
    over = ("interrupted", "killed")  # one that was interrupted while it was still loading has no run yet
    stopped = {number: job["run"] for number, job in jobs.items() if job["status"] in over and job["run"]}

    (tmp_path / "marks" / "mended").touch()
    before = len(lines(tmp_path))
    sweep = start(tmp_path, "resume_sweep=sweep", "trusted_prefixes=[survival_reward]")
    printed, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, printed
    jobs = latest(tmp_path)
    assert Counter(job["status"] for job in jobs.values()) == {"finished": 12}
    touched = {line["job"] for line in lines(tmp_path)[before:]}
    assert touched.isdisjoint(finished)
    for number, summary in written.items():
        assert (tmp_path / finished[number]["run"] / "summary.json").read_bytes() == summary
    for number, run in stopped.items():
        assert jobs[number]["run"] == run
    for job in jobs.values():
        metrics = [json.loads(line) for line in (tmp_path / job["run"] / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in metrics if line["step"]] == list(range(1, 9))
        assert job["objective"] == metrics[-1]["reward"]
    assert_reported(tmp_path / "sweep" / "report", [*jobs.values(), *failed])  # what failed was repeated beside it
    assert {p.parent.name for p in tmp_path.glob("sweep/*/config.yaml")} >= {Path(j["run"]).name for j in jobs.values()}
