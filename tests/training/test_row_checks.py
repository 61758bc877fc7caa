"""What a composition reads, the rows must have; the messages on the command line are in test_bad_input."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from selfdistill import RolloutSource
from selfdistill.errors import UserError
from selfdistill.rewards import AnswerLikelihood, ExactMatch, InverseLoss, Mix, Supervised
from selfdistill.training.row_checks import check_rows
from tests.command import command
from tests.tiny import tiny_tokenizer


def checked(reward: Any, answers: list, golden: list, fraction: float = 1.0, field: str = "golden_response") -> None:
    rollout = RolloutSource(on_policy_fraction=fraction, demonstration_field=field)
    columns = {"prompt": ["p"] * len(answers), "answer": answers, "golden_response": golden}
    rows = Dataset.from_dict({**columns, "id": [str(i) for i in range(len(answers))]})
    check_rows(reward, rows, rollout, "f.jsonl")


@pytest.mark.parametrize(
    ("answers", "golden"), [(["a", "b"], [[], []]), ([None, "b"], [[], []]), ([None, None], [[], ["g"]])]
)
def test_one_answer_or_golden_response_is_enough_for_a_reward(answers: list, golden: list) -> None:
    checked(ExactMatch(), answers, golden)


def test_rewards_without_answers_need_none() -> None:
    checked(InverseLoss(), [None], [[]])
    checked(lambda **_: [], [None], [[]])
    checked(None, [None], [[]])


@pytest.mark.parametrize(("answers", "refused"), [(["a", "b", "cd"], True), (["a", "bc", "de"], False)])
def test_answers_of_one_token_give_supervised_no_signal(answers: list[str], refused: bool) -> None:
    rows = Dataset.from_dict({"prompt": ["p"] * 3, "answer": answers, "golden_response": [[]] * 3, "id": ["1"] * 3})
    for reward, wrong in ((Supervised(), refused), (Supervised(include_eos=True), False), (AnswerLikelihood(), False)):
        with pytest.raises(UserError, match="2 of 3 .*reward=answer_likelihood") if wrong else nullcontext():
            check_rows(reward, rows, RolloutSource(), "f.jsonl", tiny_tokenizer())


@pytest.mark.long
@pytest.mark.parametrize("experiment", ["sft", "sdft"])
def test_questions_with_answers_are_demonstrations(experiment: str, tmp_path: Path) -> None:
    rows = "".join(f'{{"prompt": "add {i} 1", "answer": "{i + 1}"}}\n' for i in range(9))
    (tmp_path / "my.jsonl").write_text(rows)
    small = ["completions_per_step=4", "rollout.max_completion_tokens=8", "dry_run=true", "logger=none", "hardware=cpu"]
    done = command([f"experiment={experiment}", "data=jsonl", "data.path=my.jsonl", "eval=none", *small], tmp_path)
    assert done.code == 0, done.err


def test_a_part_of_a_mix_is_named() -> None:
    mix = Mix({"short": InverseLoss(), "right": ExactMatch()})
    with pytest.raises(UserError, match=r"^reward\.rewards\.right\.answer_field=answer: no row of f\.jsonl"):
        checked(mix, [None, None], [[], []])


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_every_row_needs_its_demonstration(fraction: float) -> None:
    checked(None, [None, None], [["g"], ["h"]], fraction)
    checked(None, ["a", "b"], [[], []], fraction, field="answer")
    checked(None, ["a", "b"], [["g"], []], fraction)  # the answer is the demonstration
    with pytest.raises(UserError, match=r"f\.jsonl, row 1 has no demonstration"):
        checked(None, [None, None], [["g"], []], fraction)
    with pytest.raises(UserError, match=r"no row of f\.jsonl has a demonstration.*data\.demonstration_field=NAME"):
        checked(None, [None, None], [[], []], fraction)
    checked(None, ["a", "b"], [["g"], []], 1.0)
