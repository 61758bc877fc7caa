import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from selfdistill import train
from selfdistill.config import doors
from selfdistill.config.conf import CONF
from selfdistill.runs.sweep import CheckSweep
from tests.command import Outcome, command

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
        return folder, command(["--multirun", *reward, *grid, *FAST], folder)


def jobs(folder: Path) -> list[dict]:
    (file,) = folder.glob("outputs/multirun/*/jobs.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_one_failing_job_stops_no_other(sweep: tuple[Path, Outcome]) -> None:
    folder, outcome = sweep
    assert outcome.code == 1
    assert [job["status"] for job in jobs(folder)] == ["failed", "refused", "finished", "refused"]
    assert [job["job"] for job in jobs(folder)] == [0, 1, 2, 3]


def test_every_failure_is_said_in_one_line(sweep: tuple[Path, Outcome]) -> None:
    _, outcome = sweep
    lines = outcome.err.splitlines()
    assert [line[:19] for line in lines] == ["selfdistill: job 0:", "selfdistill: job 1:", "selfdistill: job 3:"]
    assert "the reward broke" in lines[0]
    assert "bad.jsonl, line 1" in lines[1]


def test_the_end_is_a_table_of_the_jobs(sweep: tuple[Path, Outcome]) -> None:
    _, outcome = sweep
    table = outcome.out[outcome.out.index("4 jobs") :]
    assert [table.count(status) for status in ("failed", "refused", "finished")] == [1, 2, 1]


def test_runs_have_their_own_ids_and_share_a_group(sweep: tuple[Path, Outcome]) -> None:
    folder, _ = sweep
    runs = [Path(job["run"]) for job in jobs(folder) if "run" in job]
    assert len(set(runs)) == 2
    assert {run.name for run in runs} == {path.name for path in (folder / "outputs").iterdir()} - {"multirun"}
    configurations = [OmegaConf.load(folder / run / "config.yaml") for run in runs]
    (group,) = {cfg.group for cfg in configurations}
    (sweep_folder,) = (folder / "outputs" / "multirun").iterdir()
    assert group == f"multirun-{sweep_folder.name}"
    assert json.loads((folder / runs[1] / "summary.json").read_text())["status"] == "finished"


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
    door = SimpleNamespace(
        __name__="train", main=lambda: doors.main(CONF / "train.yaml", stand_in, train.__doc__, sweeps=True)
    )
    space = "learning_rate=tag(log,interval(1e-5,1e-3))"
    outcome = command([*line, space, "hydra.sweep.dir=study"], tmp_path, door)  # type: ignore[arg-type]
    assert outcome.code == 0, outcome.err
    results = OmegaConf.load(tmp_path / "study" / "optimization_results.yaml")
    assert len(set(accuracies)) == 6
    assert results.best_value == max(accuracies)


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
