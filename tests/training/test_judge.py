"""Who judges the evaluation, and that what judges says the same there as it does as a reward."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from selfdistill import config
from selfdistill.config.targets import make
from selfdistill.evaluation.evaluator import EvalSettings
from selfdistill.rewards import Arithmetic, ExactMatch, InverseLoss, Mix, MultipleChoice
from selfdistill.training.build import judge
from tests.command import command, composed


def by_hand(completions: list, **_: Any) -> list[float]:
    return [1.0 for _ in completions]


def settings(*overrides: str) -> tuple[config.Run, EvalSettings, Any]:
    run = config.check(composed(["hardware=cpu", *overrides]), overrides)
    return run, make(run.eval, "eval"), make(run.reward, "reward")


@pytest.mark.parametrize(
    ("overrides", "kind", "said"),
    [
        (["reward=multiple_choice"], MultipleChoice, "multiple_choice, as the reward"),
        (["reward=arithmetic"], Arithmetic, "as the reward"),
        (["reward=supervised"], ExactMatch, "supervised does not tell right from wrong"),
        (["experiment=sft"], ExactMatch, "there is no reward"),
        (["reward=arithmetic", "reward@eval.scorer=multiple_choice"], MultipleChoice, r"multiple_choice (eval.scorer)"),
        (["reward=arithmetic", "eval.scorer=${reward}"], Arithmetic, "arithmetic (eval.scorer)"),
        (["eval.scorer={_target_: selfdistill.rewards.Arithmetic}"], Arithmetic, "arithmetic (eval.scorer)"),
    ],
)
def test_the_runs_own_reward_judges_where_it_can(overrides: list[str], kind: type, said: str) -> None:
    scorer, told = judge(*settings(*overrides))
    assert type(scorer) is kind
    assert said in told


def test_a_part_of_a_mix_and_a_function_that_declares_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked, _ = settings()
    assert type(judge(run, asked, Mix({"short": InverseLoss(), "right": Arithmetic()}))[0]) is Arithmetic
    assert type(judge(run, asked, Mix({"short": InverseLoss()}))[0]) is ExactMatch
    assert type(judge(run, asked, partial(by_hand))[0]) is ExactMatch
    monkeypatch.setattr(by_hand, "verifiable", True, raising=False)
    own = partial(by_hand)
    assert judge(run, asked, own)[0] is own


def test_answers_may_be_as_long_as_in_the_training() -> None:
    assert settings("rollout.max_completion_tokens=77")[1].max_new_tokens == 77
    assert settings("rollout.max_completion_tokens=77", "eval.max_new_tokens=5")[1].max_new_tokens == 5


@pytest.mark.long
def test_a_judge_that_asks_the_policy_is_given_it(tmp_path: Path) -> None:
    """And a run keeps every row with its answer and its verdict, whose mean is the accuracy."""
    line = ["dry_run=true", "logger=none", "hardware=cpu", "completions_per_step=4", "rollout.max_completion_tokens=4"]
    small = ["eval.max_rows=3", "eval.max_rows_per_suite=1", "eval.scorer=${reward}", "reward=inverse_loss"]
    done = command([*line, *small, "hydra.run.dir=run"], tmp_path)
    assert done.code == 0, done.err
    items = [json.loads(row) for row in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert {item["step"] for item in items} == {0, 1}
    verdicts = [item["verdict"] for item in items if item["step"] == 1 and item["suite"] is None]
    accuracy = json.loads((tmp_path / "run" / "summary.json").read_text())["eval"]["after"]["eval/accuracy"]
    assert accuracy == pytest.approx(sum(verdicts) / 3)
    assert accuracy < 0
