import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from selfdistill import train
from selfdistill.comparison import charts
from selfdistill.config import check, doors
from selfdistill.config.conf import CONF
from selfdistill.runs.sweep import CheckSweep, command_line
from selfdistill.runs.sweep_folder import Job, SweepFolder
from tests.command import Outcome, command, options

FAST = ["debug=fast", "eval=none", "hardware=cpu", "completions_per_step=8"]
REWARD = """
def score(completions, fail=False, **columns):
    if fail:
        raise RuntimeError("the reward broke")
    return [float(len(completion[0]["content"])) for completion in completions]
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """Four jobs: the reward breaks in the first two, the data of the second and fourth cannot be read."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep_reward.py").write_text(REWARD)
    (folder / "bad.jsonl").write_text('{"prompt": "a"')
    reward = ["reward=function", "reward._target_=sweep_reward.score", "trusted_prefixes=[sweep_reward]"]
    grid = ["+reward.fail=true,false", "data.path=embedded:half_known_train,bad.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(charts, "charts", lambda comparison: iter(()))  # pictures take seconds
        return folder, command(["--multirun", *reward, *grid, *FAST], folder)


def jobs(folder: Path) -> list[dict]:
    """What the last line on each job says."""
    (file,) = folder.glob("outputs/multirun/*/jobs.jsonl")
    return list({job["job"]: job for job in map(json.loads, file.read_text().splitlines())}.values())


@pytest.mark.long
def test_one_failing_job_stops_no_other(sweep: tuple[Path, Outcome]) -> None:
    folder, outcome = sweep
    assert outcome.code == 1
    assert [job["status"] for job in jobs(folder)] == ["failed", "refused", "finished", "refused"]
    assert [job["job"] for job in jobs(folder)] == [0, 1, 2, 3]


@pytest.mark.long
def test_every_failure_is_said_in_one_line(sweep: tuple[Path, Outcome]) -> None:
    _, outcome = sweep
    changes = outcome.out[: outcome.out.index("4 jobs, written")].splitlines()
    lines = [line for line in changes if " failed " in line[:16] or " refused " in line[:16]]
    assert sorted(line[:13] for line in lines) == ["job 0 failed ", "job 1 refused", "job 3 refused"]
    lines.sort()
    assert "the reward broke" in lines[0]
    assert "bad.jsonl, line 1" in lines[1]


@pytest.mark.long
def test_what_a_job_printed_is_kept(sweep: tuple[Path, Outcome]) -> None:
    folder, _ = sweep
    (logs,) = folder.glob("outputs/multirun/*/logs")
    assert [file.name for file in sorted(logs.iterdir())] == [f"job-{number}.txt" for number in range(4)]
    assert "where everything lies" in (logs / "job-2.txt").read_text()
    assert "the reward broke" in (logs / "job-0.txt").read_text()


@pytest.mark.long
def test_the_end_is_a_table_of_the_jobs(sweep: tuple[Path, Outcome]) -> None:
    _, outcome = sweep
    table = outcome.out[outcome.out.index("4 jobs") : outcome.out.index("1 failed, 2 refused; go on with: ")]
    assert [table.count(status) for status in (" failed ", " refused ", " finished ")] == [1, 2, 1]


@pytest.mark.long
def test_runs_have_their_own_ids_and_share_a_group(sweep: tuple[Path, Outcome]) -> None:
    folder, _ = sweep
    runs = [Path(job["run"]) for job in jobs(folder) if job["run"]]
    assert len(set(runs)) == 2
    assert [path.name for path in (folder / "outputs").iterdir()] == ["multirun"]
    assert {run.name for run in runs} == {path.parent.name for path in folder.glob("outputs/*/*/*/config.yaml")}
    configurations = [OmegaConf.load(folder / run / "config.yaml") for run in runs]
    (group,) = {cfg.group for cfg in configurations}
    (sweep_folder,) = (folder / "outputs" / "multirun").iterdir()
    assert group == f"multirun-{sweep_folder.name}"
    assert json.loads((folder / runs[1] / "summary.json").read_text())["status"] == "finished"


@pytest.mark.long
def test_a_checked_sweep_shows_its_jobs_and_leaves_nothing(tmp_path: Path) -> None:
    line = "--multirun experiment=sdpo beta=0,0.04 alpha=0,0.5,1 num_generations=4,8 --check"
    outcome = command(line.split(), tmp_path)
    assert (outcome.code, outcome.err, outcome.left) == (0, "", set())
    assert "12 jobs checked" in outcome.out
    assert "beta=0.04 alpha=1 num_generations=8" in outcome.out


def test_flags_may_stand_between_keys(tmp_path: Path) -> None:
    outcome = command(["seed=0,1", "-m", "max_steps=2", "--check"], tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 jobs checked" in outcome.out


@pytest.mark.long
def test_optuna_names_the_job_with_the_highest_accuracy(tmp_path: Path) -> None:
    """With the sweeper's own code, and in the place of the run a function of the learning rate."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    accuracies: list[float] = []

    def stand_in(cfg: DictConfig) -> float:
        accuracies.append(1 - abs(cfg.learning_rate - 3e-4) * 1000)
        return accuracies[-1]

    line = ["--multirun", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.seed=1"]
    line.append("hydra/launcher=basic")  # in this process
    door = SimpleNamespace(
        __name__="train", main=lambda: doors.main(CONF / "train.yaml", stand_in, train.__doc__, sweeps=True)
    )
    space = "learning_rate=tag(log,interval(1e-5,1e-3))"
    outcome = command([*line, space, "hydra.sweep.dir=study"], tmp_path, door)  # type: ignore[arg-type]
    assert outcome.code == 0, outcome.err
    results = OmegaConf.load(tmp_path / "study" / "optimization_results.yaml")
    assert len(set(accuracies)) == 6
    assert results.best_value == max(accuracies)


def test_a_search_all_of_whose_runs_fail_ends_with_the_table(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    short = ["sweep=search", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2", "hydra.sweep.dir=study"]
    outcome = command([*short, "data=jsonl", "data.path=absent.jsonl"], tmp_path)
    assert outcome.code == 1
    assert "2 jobs, written to study" in outcome.out and outcome.out.count(" failed ") >= 2
    assert outcome.err.count("no run of the search has ended well") == 1 and "Traceback" not in outcome.err


def test_what_the_search_calls_is_trusted_first(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    line = ["--multirun", "hydra/sweeper=optuna", "hydra.sweeper.custom_search_space=os.system", "seed=0,1"]
    outcome = command(line, tmp_path)
    assert (outcome.code, outcome.left) == (2, set())
    assert "hydra.sweeper.custom_search_space" in outcome.err


def test_options_of_a_group_may_be_found_by_a_pattern(tmp_path: Path) -> None:
    outcome = command(["--multirun", "experiment=glob(sdpo*)", "--check"], tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 jobs checked" in outcome.out


def test_no_secret_is_left_in_a_sweeps_files(tmp_path: Path) -> None:
    """Hydra's sweepers write multirun.yaml as it was given, and then start their first job."""
    given = ["+training.arguments.hub_token=hf_abcdefghijkl", "teacher.base_url=http://me:hunter2@h/v1", "seed=0,1"]
    hydra = {"mode": "MULTIRUN", "sweep": {"dir": str(tmp_path)}, "overrides": {"task": given}}
    (tmp_path / "multirun.yaml").write_text(OmegaConf.to_yaml({"hydra": hydra}))
    config = OmegaConf.create({"hydra": {**hydra, "mode": RunMode.MULTIRUN}})
    CheckSweep().on_job_start(config)
    written = OmegaConf.load(tmp_path / "multirun.yaml")
    assert written.hydra.overrides.task == [
        "+training.arguments.hub_token=***",
        "teacher.base_url=http://***@h/v1",
        "seed=0,1",
    ]


SWEEPS = options("sweep")


@pytest.mark.parametrize("name", SWEEPS)
def test_shipped_sweeps_are_composed(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        swept = compose("train", [f"sweep={name}"], return_hydra_config=True).hydra.sweeper.params
        values = {key: str(value).split(",")[0] for key, value in swept.items() if "(" not in str(value)}
        job = [f"sweep={name}", *(f"{key}={value}" for key, value in values.items())]
        assert check(compose("train", job), job)
    assert swept


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(SWEEPS) - {"search"}))
def test_every_job_of_a_shipped_sweep_is_accepted(name: str, tmp_path: Path) -> None:
    outcome = command([f"sweep={name}", "--check"], tmp_path)
    assert (outcome.code, outcome.err, outcome.left) == (0, "", set())
    said = (CONF / "sweep" / f"{name}.yaml").read_text().split(" runs.")[0].split()[-1]
    assert f"{said} jobs checked" in outcome.out


def test_keys_of_the_command_line_come_before_those_of_a_sweep(tmp_path: Path) -> None:
    outcome = command(["sweep=sdpo", "beta=0.1", "alpha=0,1", "num_generations=4", "seed=1", "--check"], tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 jobs checked" in outcome.out


def test_a_checked_search_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    outcome = command(["sweep=search", "--check"], tmp_path)
    assert (outcome.code, outcome.err, outcome.left) == (0, "", set())
    assert "each is checked when it starts" in outcome.out


@pytest.mark.long
def test_a_search_that_was_interrupted_proposes_the_same_and_goes_on(tmp_path: Path) -> None:
    """The learning rates of an unbroken search are those of one that goes on after half of its jobs."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    short = ["sweep=search", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "max_steps=1", "logger=none"]
    short += ["hardware=cpu", "completions_per_step=8", "rollout.max_completion_tokens=4", "objective=reward"]
    outcome = command([*short, "eval=none", "hydra.sweep.dir=whole"], tmp_path)
    assert outcome.code == 0, outcome.out
    whole = SweepFolder(tmp_path / "whole")
    first = whole.jobs()
    assert [job.status for job in first.values()] == ["finished"] * 4
    assert len({tuple(job.overrides) for job in first.values()}) == 4
    best = OmegaConf.load(tmp_path / "whole" / "optimization_results.yaml")
    assert best.best_value == max(job.objective for job in first.values() if job.objective is not None)
    for number in (2, 3):  # as if it had been stopped there
        whole.note(Job(number, first[number].overrides))
    assert command(["resume_sweep=whole"], tmp_path).code == 0
    again = whole.jobs()
    assert {number: job.overrides for number, job in again.items()} == {n: job.overrides for n, job in first.items()}
    assert [again[n].run == first[n].run for n in range(4)] == [True, True, False, False]
    assert [again[n].objective for n in range(4)] == [first[n].objective for n in range(4)]


@pytest.mark.parametrize(
    ("typed", "flags"),
    [
        (["sweep=sdpo"], 1),
        (["sweep=null", "seed=1"], 0),
        (["sweep=sdpo", "-m"], 0),
        (["sweep=sdpo", "--cfg", "job"], 0),
    ],
)
def test_a_sweep_brings_its_flag_along(typed: list[str], flags: int) -> None:
    assert command_line(typed) == ["--multirun"] * flags + typed
