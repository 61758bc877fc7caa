from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from selfdistill.config import check
from selfdistill.config.checks import without_unread
from selfdistill.runs import sweep
from selfdistill.runs.console import differences, flat
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.labels import Labels, defaults, labels_of
from tests.command import command, composed
from tests.runs.test_console import shown


def test_a_method_is_the_experiment_or_what_makes_up_the_run() -> None:
    assert Labels({"experiment": "sdpo", "reward": "exact_match"}).method == "sdpo"
    assert (
        Labels({"experiment": "null", "reward": "exact_match", "teacher": "feedback"}).method == "exact_match-feedback"
    )
    assert Labels({"reward": "none", "teacher": "none"}).method is None
    assert Labels({"model": "x" * 90}).tags == ["model=" + "x" * 58]


def test_a_folder_without_hydra_s_files_has_no_labels(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "r", OmegaConf.create({}))
    assert labels_of(run.path) == Labels()
    assert labels_of(run.path).name(run) == run.run_id
    run.finish("finished")


def test_a_group_of_which_nothing_was_chosen_has_no_label(tmp_path: Path) -> None:
    """Hydra keeps such a group with null."""
    hydra = {"mode": "RUN", "runtime": {"choices": {"experiment": None, "reward": "exact_match", "teacher": "none"}}}
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save({"hydra": {**hydra, "job": {"override_dirname": ""}}}, tmp_path / ".hydra" / "hydra.yaml")
    labels = labels_of(tmp_path)
    assert labels.tags == ["reward=exact_match"]
    assert labels.fields["experiment"] is labels.fields["teacher"] is None
    assert labels.method == "exact_match"


def test_jobs_of_a_sweep_are_named_by_what_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name comes from Hydra's own override_dirname, so that every launcher carries it to its jobs."""
    names = []

    def check_jobs(config: object) -> None:
        from hydra import compose

        given = OmegaConf.select(config, "hydra.overrides.hydra")
        job = ["experiment=sdpo", "max_steps=2", "beta=0.04", "alpha=0.5", "seed=1"]
        composed_job = compose("train", [*given, *job], return_hydra_config=True)
        names.append(composed_job.hydra.job.override_dirname)
        raise SystemExit(0)

    monkeypatch.setattr(sweep, "check_jobs", check_jobs)
    command(["-m", "experiment=sdpo", "max_steps=2", "beta=0,0.04", "alpha=0.5,1", "seed=range(0,2)"], tmp_path)
    assert names == ["alpha=0.5 beta=0.04 seed=1"]


def test_keys_that_nothing_reads_are_null_and_the_others_stay() -> None:
    cfg = composed(["reward=exact_match", "teacher=none"])
    before, after = (flat(OmegaConf.to_container(c, resolve=True)) for c in (cfg, without_unread(cfg, check(cfg))))
    assert before.keys() == after.keys()
    unread = {key for key in before if before[key] is not None and after[key] is None}
    assert unread >= {"alpha", "distillation.alpha", "distillation.tail", "policy_weight", "model.lora.r"}
    assert not unread & {"beta", "seed", "learning_rate", "num_generations", "reward._target_"}
    taught = composed(["experiment=sdpo"])
    assert without_unread(taught, check(taught)).alpha == 0.5


def test_only_what_differs_from_the_defaults_is_shown() -> None:
    cfg = composed(["experiment=sdpo", "learning_rate=3e-5", "+teacher.api_key=sk-something-secret"])
    choices = {"experiment": "sdpo", "reward": "exact_match", "teacher": "feedback", "teacher/weights": "ema"}
    text = shown(differences(cfg, *defaults(choices), choices))
    assert len(text.splitlines()) < 20
    for part in ("experiment=sdpo", "teacher=feedback", "learning_rate=3e-05", "num_generations=8", "api_key=***"):
        assert part in text
    assert "_target_" not in text and "seed" not in text
    assert "policy_gradient" not in text
    assert text.count("num_generations") == 1
    assert not GlobalHydra.instance().is_initialized()
    nothing = composed()
    assert "nothing" in shown(differences(nothing, *defaults({}), {}))
