"""Hydra's own conventions: where its keys put a run, what lies in `.hydra`, a user's own files, completion."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf

from selfdistill.comparison import charts
from selfdistill.runs.placement import destination
from selfdistill.runs.sweep import CheckSweep
from selfdistill.runs.sweep_folder import Job, SweepFolder
from tests.command import Outcome, command

FAST = ["debug=fast", "eval=none", "logger=none", "hardware=cpu", "hardware.per_device_batch_size=8"]
SECRET = "sk-0123456789"
REWARD = """
def score(completions, api_key="", **columns):
    return [float(len(completion[0]["content"])) for completion in completions]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run in a folder of the user's choice, with a secret on the command line."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "placed_reward.py").write_text(REWARD)
    reward = ["reward=function", "reward._target_=placed_reward.score", "trusted_prefixes=[placed_reward]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        arguments = [*FAST, *reward, f"+reward.api_key={SECRET}", "+reward.password=abc", "hydra.run.dir=my/runs/first"]
        return folder, command(arguments, folder)


def test_the_folder_that_hydra_names_is_the_runs(run: tuple[Path, Outcome]) -> None:
    folder, outcome = run
    assert outcome.code == 0, outcome.err
    summary = json.loads((folder / "my/runs/first/summary.json").read_text())
    assert (summary["run_id"], summary["status"]) == ("first", "finished")
    assert not (folder / "outputs").exists()


def test_overrides_are_recorded_as_hydras_users_know_them(run: tuple[Path, Outcome]) -> None:
    hydra = run[0] / "my/runs/first/.hydra"
    overrides = OmegaConf.load(hydra / "overrides.yaml")
    assert overrides[:2] == ["debug=fast", "eval=none"]
    assert {"+reward.api_key=***", "+reward.password=***"} <= set(overrides)
    assert OmegaConf.load(hydra / "hydra.yaml").hydra.run.dir == "my/runs/first"
    with initialize_config_dir(str(hydra), version_base="1.3"):
        assert compose("config", ["seed=5"]).reward._target_ == "placed_reward.score"


def test_no_secret_is_left_in_the_folder(run: tuple[Path, Outcome]) -> None:
    for file in (run[0] / "my").rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
    for file in (run[0] / "my/runs/first/.hydra").iterdir():
        assert "password=abc" not in file.read_text() and "password: abc" not in file.read_text()


def test_a_folder_that_holds_a_run_is_refused(run: tuple[Path, Outcome]) -> None:
    folder, _ = run
    outcome = command([*FAST, "hydra.run.dir=my/runs/first"], folder)
    assert (outcome.code, outcome.left) == (2, set())
    assert "my/runs/first holds a run already" in outcome.err
    outcome = command([*FAST, "hydra.run.dir=my"], folder)
    assert (outcome.code, outcome.left) == (2, set())
    assert "my is not empty" in outcome.err


@pytest.mark.parametrize("mistake", ["--check", "beta=-1", "data.path=missing.jsonl"])
def test_nothing_empty_is_left(mistake: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    outcome = command([*FAST, mistake, "hydra.run.dir=mine/deep/run"], tmp_path)
    assert (outcome.code, outcome.left) == (0 if mistake == "--check" else 2, set())
    assert (tmp_path / "mine").is_dir()


def runs_of(sweep: Path) -> list[Path]:
    lines = [json.loads(line) for line in (sweep / "jobs.jsonl").read_text().splitlines()]
    return [Path(line["run"]) for line in lines if line["status"] == "finished"]


@pytest.mark.long
def test_the_runs_of_a_sweep_lie_below_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "charts", lambda comparison: iter(()))  # pictures take seconds
    outcome = command(["--multirun", "seed=0,1", *FAST, "hydra.sweep.dir=mine"], tmp_path)
    assert outcome.code == 0, outcome.err
    assert {run.parent for run in runs_of(tmp_path / "mine")} == {Path("mine")}
    assert not (tmp_path / "outputs").exists()
    assert OmegaConf.load(tmp_path / runs_of(tmp_path / "mine")[1] / ".hydra" / "overrides.yaml")[0] == "seed=1"
    outcome = command(["--multirun", "seed=0,1", *FAST, "hydra.sweep.dir=mine"], tmp_path)
    assert (outcome.code, outcome.left) == (2, set())
    assert "hydra.sweep.dir=mine holds a sweep already" in outcome.err


@pytest.mark.long
def test_a_subdir_names_the_runs_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "charts", lambda comparison: iter(()))  # pictures take seconds
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"')
    paths = "data.path=embedded:half_known_train,bad.jsonl"
    where = ["hydra.sweep.dir=mine", "hydra.sweep.subdir=runs/${hydra.job.num}"]
    outcome = command(["--multirun", paths, *FAST, *where], tmp_path)
    assert outcome.code == 1
    assert (tmp_path / "mine/runs/0/summary.json").is_file()
    assert not (tmp_path / "mine/runs/1").exists()


def test_a_job_that_is_repeated_has_a_folder_beside_that_of_the_failed_run(tmp_path: Path) -> None:
    failed = tmp_path / "runs" / "1"
    failed.mkdir(parents=True)
    (failed / "config.yaml").touch()
    SweepFolder(tmp_path).note(Job(1, [], "failed", run=str(failed)))

    def placed(number: int) -> Path | None:
        sweep = {"dir": str(tmp_path), "subdir": "runs/1"}
        return destination(
            OmegaConf.create({}), OmegaConf.create({"mode": RunMode.MULTIRUN, "sweep": sweep, "job": {"num": number}})
        )[1]

    assert placed(1) == tmp_path / "runs" / "1-2"
    (tmp_path / "runs" / "1-2").mkdir()
    (tmp_path / "runs" / "1-2" / "config.yaml").touch()
    assert placed(1) == tmp_path / "runs" / "1-3"
    assert placed(2) == failed, "two jobs that share a name are refused"


@pytest.mark.long
def test_an_own_experiment_and_an_own_primary_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/short.yaml").write_text("# @package _global_\nmax_steps: 3\n")
    (tmp_path / "mine/mytrain.yaml").write_text("defaults:\n  - train\n  - _self_\nseed: 7\n")
    outcome = command(["--config-dir", "mine", "experiment=short", "--cfg", "job"], tmp_path)
    assert "max_steps: 3" in outcome.out
    for arguments in (["--check"], ["-m", "beta=0,0.1", "--check"]):
        outcome = command(["--config-dir", "mine", "--config-name", "mytrain", *arguments], tmp_path)
        assert (outcome.code, outcome.err, outcome.left) == (0, "", set())
    assert "2 jobs checked" in outcome.out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("exper", {"experiment="}),
        ("experiment=sdp", {"experiment=sdpo", "experiment=sdpo_feedback"}),
        ("teacher/", {"teacher/context=", "teacher/weights="}),
        ("learning", {"learning_rate="}),
        ("distillation.to", {"distillation.top_k="}),
    ],
)
def test_the_shell_completes_groups_and_keys(
    typed: str, offered: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_LINE", f"selfdistill {typed}")
    outcome = command(["--shell-completion", "query=bash"], tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert offered <= set(outcome.out.split())


class BasicSweeper:
    """Adaptive, whatever its name ends in."""


@pytest.mark.parametrize("name", ["tests.runs.test_placement.BasicSweeper", "tests.runs.test_placement.OwnGrid"])
def test_a_sweeper_is_a_grid_by_what_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper as Grid  # Hydra loads its plugins anew at times

    checked: list[str] = []
    monkeypatch.setattr("tests.runs.test_placement.OwnGrid", type("OwnGrid", (Grid,), {}), raising=False)
    monkeypatch.setattr("selfdistill.runs.sweep.check_jobs", lambda config: checked.append(name))
    monkeypatch.chdir(tmp_path)
    hydra = {"sweep": {"dir": "nowhere"}, "sweeper": {"_target_": name}, "overrides": {"task": [], "hydra": []}}
    hydra["job"] = {"config": {"override_dirname": {"exclude_keys": []}}}
    CheckSweep().on_multirun_start(OmegaConf.create({"check": False, "hydra": hydra}))
    assert checked == ([name] if name.endswith("OwnGrid") else [])
