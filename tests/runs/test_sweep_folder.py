"""What a sweep's folder holds, and the command line that goes on with it."""

import json
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from selfdistill.errors import UserError
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.sweep_folder import Job, SweepFolder, objective_of, resumed_arguments

TYPED = ["--multirun", "experiment=sdpo", "beta=0,0.04", "+reward.api_key=sk-0123456789", "hydra.launcher.n_jobs=2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    """A sweep that was started in tmp_path/started."""
    (tmp_path / "started").mkdir()
    monkeypatch.chdir(tmp_path / "started")
    folder = SweepFolder(tmp_path / "started" / "out" / "sweep")
    folder.begin(TYPED, [[*TYPED[1:2], f"beta={beta}", TYPED[3]] for beta in ("0", "0.04")])
    return folder


def run_in(path: Path, status: str = "finished", **summary: object) -> RunFolder:
    run = RunFolder.create(path, "r", OmegaConf.create({"objective": "eval/accuracy"}))
    run.log_metrics(1, {"reward": 0.5, "eval/accuracy": 0.25})
    run.finish(status, **summary)  # type: ignore[arg-type]
    return run


def test_the_plan_is_there_from_the_start_without_secrets(folder: SweepFolder) -> None:
    assert [(job.number, job.status) for job in folder.jobs().values()] == [(0, "waiting"), (1, "waiting")]
    assert folder.jobs()[1].overrides == ["experiment=sdpo", "beta=0.04", "+reward.api_key=***"]
    assert folder.plan()["arguments"] == [*TYPED[:3], "+reward.api_key=***", TYPED[4]]
    assert all("0123456789" not in file.read_text() for file in folder.path.iterdir())


def test_a_jobs_last_line_counts(folder: SweepFolder) -> None:
    folder.note(Job(0, ["beta=0"], "running", run="r"))
    folder.note(Job(0, ["beta=0"], "failed", run="r", message="broke"))
    with (folder.path / "jobs.jsonl").open("a") as file:
        file.write('{"job": 1, "status": "fini')  # a kill
    assert (folder.jobs()[0].status, folder.jobs()[1].status) == ("failed", "waiting")


def test_a_job_whose_process_is_gone_is_what_its_run_says(folder: SweepFolder, tmp_path: Path) -> None:
    over = run_in(tmp_path, eval={"after": {"eval/accuracy": 0.75}})
    held = RunFolder.create(tmp_path, "held", OmegaConf.create({}))
    for number, run in enumerate((over, held)):
        folder.note(Job(number, [], "running", run=str(run.path)))
    settled = folder.settled()
    assert (settled[0].status, settled[0].objective, settled[0].is_done) == ("finished", 0.75, True)
    assert settled[1].status == "running"
    held._close()  # its process is gone, and the summary says nothing of an end
    settled = folder.settled()
    assert (settled[1].status, settled[1].continues) == ("killed", True)


def test_the_objective_is_the_evaluations_or_the_metrics_last_value(tmp_path: Path) -> None:
    assert objective_of(run_in(tmp_path, eval={"after": {"eval/accuracy": 0.75}})) == 0.75
    assert objective_of(run_in(tmp_path)) == 0.25
    other = RunFolder.create(tmp_path, "r", OmegaConf.create({"objective": "absent"}))
    assert objective_of(other) is None
    other._close()


def test_it_goes_on_with_its_own_command_line(
    folder: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = "+reward.api_key=sk-again"
    given = ["resume_sweep=started/out/sweep", secret, "hydra.launcher.n_jobs=8"]
    assert resumed_arguments(given) == [
        *TYPED[:3], secret, "hydra.launcher.n_jobs=8", "hydra.sweep.dir='out/sweep'", "resume_sweep='out/sweep'",
    ]  # fmt: skip
    assert Path.cwd() == tmp_path / "started"
    monkeypatch.chdir(tmp_path)
    other = resumed_arguments(["resume_sweep=started/out/sweep", secret, "hydra/launcher=slurm"])
    assert "hydra.launcher.n_jobs=2" not in other
    assert "hydra/launcher=slurm" in other


def test_other_command_lines_stay_as_they_are() -> None:
    assert resumed_arguments(["seed=1", "resume_sweep=null"]) == ["seed=1", "resume_sweep=null"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["resume_sweep=nowhere"], "sweep.json of a sweep is not there"),
        (["resume_sweep=out/sweep"], "reward.api_key is secret and was not recorded"),
        (["resume_sweep=out/sweep", "+reward.api_key=x", "beta=1"], "beta cannot be changed when a sweep goes on"),
        (["resume_sweep=broken"], "sweep.json of a sweep is not there, or cannot be read"),
    ],
)
def test_what_cannot_go_on_is_said(folder: SweepFolder, given: list[str], said: str) -> None:
    Path("broken").mkdir()
    Path("broken/sweep.json").write_text(json.dumps({"folder": "."}))
    with pytest.raises(UserError, match=said):
        resumed_arguments(given)


GRANTING = [
    "trusted_prefixes=[os]",
    "allow_code_execution=true",
    "model.trust_remote_code=true",
    "+training.arguments.trust_remote_code=true",
    "export.llama_cpp=evil",
    "reward={_target_: selfdistill.rewards.PythonTests, allow_code_execution: true}",
    "hydra.launcher.setup=[./evil]",
]


@pytest.mark.parametrize("grant", GRANTING)
def test_what_lets_jobs_run_code_is_granted_anew(grant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = SweepFolder("sweep")
    sweep.begin(["--multirun", "eval.trusted_prefixes=[]", grant, "seed=1,2"], None)
    told = shlex.quote(grant)
    with pytest.raises(UserError, match=rf"its sweep.json has {re.escape(grant)}, .* add {re.escape(told)}$"):
        resumed_arguments(["resume_sweep=sweep"])
    again = resumed_arguments(["resume_sweep=sweep", grant])
    assert again[:4] == ["--multirun", "eval.trusted_prefixes=[]", grant, "seed=1,2"]  # a job is known by this order
    assert sweep.resume_command() == f"python -m selfdistill.train resume_sweep=sweep {told}"
