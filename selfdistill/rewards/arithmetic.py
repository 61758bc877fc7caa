"""Questions whose answer is a number."""

import math
import re
from collections.abc import Sequence
from typing import Any

from selfdistill.errors import UserError
from selfdistill.rewards.base import Result, Reward, answers_of
from selfdistill.rewards.exact import check_feedback
from selfdistill.rollout import text_of

# A minus behind a digit, letter or bracket subtracts; elsewhere it is a sign. Commas count between groups of three.
SIGN = r"(?:(?<![\w.)\]])-)?"
NUMBER = re.compile(SIGN + r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][+-]?\d+)?")


def last_number(text: str) -> float | None:
    """The last number in a text, or None: 1,234.5 and −3 and 2e5 are one number each, in 5-3 the last is 3."""
    found = NUMBER.findall(text.replace("−", "-"))
    return float(found[-1].replace(",", "")) if found else None


class Arithmetic(Reward):
    """1 where the completion's last number is the answer, otherwise 0; None where the row has no answer.

    Args:
        answer_field: the column with the answer; of a text, its last number counts.
        tolerance: relative difference that still counts as equal.
        feedback: `none` (plain floats), `verdict`, `answer` (also the right number).
    """

    def __init__(self, answer_field: str = "answer", tolerance: float = 1e-9, feedback: str = "verdict") -> None:
        check_feedback(feedback)
        self.answer_field = answer_field
        self.tolerance = tolerance
        self.feedback = feedback

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Result]:
        accepted = answers_of(columns, self.answer_field, len(completions), self.__name__)
        return [
            self._judge(text_of(completion), answers, row)
            for row, (completion, answers) in enumerate(zip(completions, accepted, strict=True))
        ]

    def _judge(self, text: str, answers: list[str], row: int) -> Result:
        if not answers:
            return None
        wanted, given = last_number(answers[0]), last_number(text)
        if wanted is None:
            raise UserError(
                f"reward {self.__name__}, row {row} of the batch: the answer {answers[0]!r} holds no number. "
                f"Correct the column {self.answer_field!r}, or name another one with reward.answer_field"
            )
        right = given is not None and math.isclose(given, wanted, rel_tol=self.tolerance)
        if self.feedback == "none":
            return float(right)
        if right:
            return {"score": 1.0, "feedback": None}
        told = "Your answer holds no number." if given is None else f"Your result {given:.12g} is wrong."
        if self.feedback == "answer":
            told += f" The correct result is {wanted:.12g}."
        return {"score": 0.0, "feedback": told}
