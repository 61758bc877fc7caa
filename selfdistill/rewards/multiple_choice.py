"""Questions with lettered options."""

import re
from collections.abc import Sequence
from typing import Any

from selfdistill.errors import UserError
from selfdistill.rewards.base import Result, Reward, answers_of
from selfdistill.rewards.exact import check_feedback
from selfdistill.rollout import text_of

TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)


class MultipleChoice(Reward):
    """1 for the right letter, otherwise 0; None where the row has no answer.

    The choice is the letter in the last <answer>…</answer>; without such tags, the last letter that stands by itself
    ("B", "(B)", "B."), so that letters inside words and chemical formulas don't count.

    Args:
        answer_field: the column with the right letter.
        choices: the letters, one character each.
        require_tags: without the tags there is no choice.
        feedback: `none` (plain floats), `verdict` (what is wrong with form or choice), `answer` (also the letter).
    """

    def __init__(
        self,
        answer_field: str = "answer",
        choices: str = "ABCD",
        require_tags: bool = False,
        feedback: str = "verdict",
    ) -> None:
        check_feedback(feedback)
        if len(choices) < 2 or not choices.isalnum():
            raise UserError(f"reward.choices is {choices!r}; write the letters without anything between, as in ABCD")
        self.answer_field = answer_field
        self.choices = choices.upper()
        self.require_tags = require_tags
        self.feedback = feedback
        self._alone = re.compile(rf"(?:^|(?<=[\s*:]))[(*]*([{self.choices}])(?=[\s.,;:!?)*]|$)")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Result]:
        accepted = answers_of(columns, self.answer_field, len(completions), self.__name__)
        return [
            self._judge(text_of(completion), answers, row)
            for row, (completion, answers) in enumerate(zip(completions, accepted, strict=True))
        ]

    def choice(self, text: str) -> tuple[str | None, str]:
        """The chosen letter, or None and what is wrong with the form."""
        shown = f"<answer>X</answer>, where X is one of {', '.join(self.choices)}"
        if tagged := TAGGED.findall(text):
            inside = tagged[-1].strip().strip("().*: ").upper()
            if len(inside) == 1 and inside in self.choices:
                return inside, ""
            return None, f"What stands between <answer> and </answer> is not a single letter. End with {shown}."
        if self.require_tags:
            return None, f"The answer is not marked. End with {shown}."
        alone = self._alone.findall(text)
        return (alone[-1], "") if alone else (None, f"No choice was found. End with {shown}.")

    def _judge(self, text: str, answers: list[str], row: int) -> Result:
        if not answers:
            return None
        answer = answers[0].strip().strip("().").upper()
        if len(answer) != 1 or answer not in self.choices:
            raise UserError(
                f"reward {self.__name__}, row {row} of the batch: the answer is {answers[0]!r}, which is none of "
                f"{', '.join(self.choices)}. Correct the column {self.answer_field!r}, or set reward.choices"
            )
        chosen, problem = self.choice(text)
        score = float(chosen == answer)
        if self.feedback == "none":
            return score
        if chosen == answer:
            return {"score": score, "feedback": None}
        told = problem or f"Your choice {chosen} is wrong."
        if self.feedback == "answer":
            told += f" The correct choice is {answer}."
        return {"score": score, "feedback": told}
