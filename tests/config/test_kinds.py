"""A trusted module is not enough: what a `_target_` names must be what the place takes where it stands."""

from pathlib import Path

import pytest

from selfdistill import config, export
from selfdistill.config.targets import check_targets
from selfdistill.errors import UserError
from tests.command import command, composed

TAUGHT = ["reward=none", "teacher=demonstration"]
MINE = "trusted_prefixes=[tests]"
HERE = "tests.config.test_kinds"
SANDBOX = "selfdistill.rewards.sandbox.Bubblewrap"
WORKER = "selfdistill.models.export.workers.Program"


class Stranger:
    """Of no kind that a configuration builds."""


def made() -> object:
    """What it returns is not known before it is called."""
    return object()


def check(*line: str) -> None:
    check_targets(config.check(composed(line)), ())


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("data", []),
        ("tasks.one", []),
        ("probes.one", []),
        ("reward", []),
        ("reward.rewards.form", ["reward=mix"]),
        ("eval", []),
        ("eval.scorer", []),
        ("eval.retention_scorer", []),
        ("teacher", TAUGHT),
        ("teacher.weights", TAUGHT),
        ("teacher.context", TAUGHT),
        ("teacher.keep", ["experiment=sdft_server", "teacher.mode=write"]),
        ("monitors", []),
        ("logger", []),
        ("export", []),
        ("export.formats.merged_16bit", ["export=merged_16bit"]),
        ("training.arguments.anything", []),
    ],
)
@pytest.mark.parametrize("program", [f"{SANDBOX}, program: evil", f"{WORKER}, python: evil"])
def test_a_class_of_ours_that_runs_programs_stands_nowhere(key: str, line: list[str], program: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}\._target_=selfdistill\.[\w.]+ is (not an? |not |nothing )"):
        check(*line, f"++{key}={{_target_: {program}}}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            [*TAUGHT, "teacher.weights._target_=selfdistill.rewards.ExactMatch"],
            ["is not weights of a teacher", "copy, ema, ema_slow, live", "teachers.weights.Weights"],
        ),
        (["monitors._target_=trl.rewards.accuracy_reward"], ["is not a set of monitors"]),
        (["logger._target_=selfdistill.files.write_atomically"], ["is not a logger", "trackio, wandb"]),
        ([*TAUGHT, MINE, f"teacher.weights._target_={HERE}.Stranger"], ["is not weights of a teacher"]),
        ([*TAUGHT, "+teacher.weights._partial_=true"], ["teacher.weights._partial_=false"]),
        ([MINE, f"reward._target_={HERE}.Stranger"], ["is a class without __call__"]),
    ],
)
def test_another_kind_is_refused_before_anything_is_written(line: list[str], words: list[str], tmp_path: Path) -> None:
    outcome = command([*line, "logger.mode=disabled"], tmp_path)
    assert (outcome.code, outcome.left) == (2, set())
    assert len(outcome.err.splitlines()) == 1, outcome.err
    for word in words:
        assert word in outcome.err


def test_exports_are_checked_alike(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "model.safetensors").touch()
    (run / "summary.json").write_text('{"run_id": "run", "status": "finished"}')
    (run / "config.yaml").write_text("model: {name: embedded}\n")
    outcome = command(["run=run", "export=lora", f"export.formats.lora._target_={SANDBOX}"], tmp_path, export)
    assert (outcome.code, outcome.left) == (2, set())
    assert f"export.formats.lora._target_={SANDBOX} is not an export format" in outcome.err


@pytest.mark.parametrize(
    "line",
    [
        [*TAUGHT, f"teacher.weights={{_target_: {HERE}.made}}"],  # a function that makes them
        ["reward=function", "reward._target_=trl.rewards.accuracy_reward"],
        ["reward=function", "reward._target_=trl.rewards.get_soft_overlong_punishment", "reward._partial_=false"],
    ],
)
def test_functions_are_taken_where_what_they_return_may_fit(line: list[str]) -> None:
    arguments = {"get_soft": ["+reward.max_completion_len=9", "+reward.soft_punish_cache=3"]}
    check(MINE, *line, *[a for name, given in arguments.items() if name in str(line) for a in given])
