"""Questions with lettered options."""

import re
from dataclasses import dataclass

from selfdistill.errors import UserError
from selfdistill.rewards.base import BadAnswer, Judge, Wrong

TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)


@dataclass(eq=False)
class MultipleChoice(Judge):
    """Right is a completion that chooses the right letter.

    The choice is the letter in the last <answer>…</answer>; without such tags, the last letter that stands by itself
    ("B", "(B)", "B."), so that letters inside words and chemical formulas don't count.

    Args:
        answer_field, feedback: see `Judge`; the verdict also says what is wrong with the form.
        choices: the letters, one character each.
        require_tags: without the tags there is no choice.
    """

    choices: str = "ABCD"
    require_tags: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.choices) < 2 or not self.choices.isalnum():
            raise UserError(
                f"reward.choices is {self.choices!r}; write the letters without anything between, as in ABCD"
            )
        self.choices = self.choices.upper()

    def choice(self, text: str) -> tuple[str | None, str]:
        """The chosen letter, or None and what is wrong with the form."""
        form = f"<answer>X</answer>, where X is one of {', '.join(self.choices)}"
        if tagged := TAGGED.findall(text):
            inside = tagged[-1].strip().strip("().*: ").upper()
            if len(inside) == 1 and inside in self.choices:
                return inside, ""
            return None, f"What stands between <answer> and </answer> is not a single letter. End with {form}."
        if self.require_tags:
            return None, f"The answer is not marked. End with {form}."
        alone = re.findall(rf"(?:^|(?<=[\s*:]))[(*]*([{self.choices}])(?=[\s.,;:!?)*]|$)", text)
        return (alone[-1], "") if alone else (None, f"No choice was found. End with {form}.")

    def judge(self, completion: str, answers: list[str]) -> Wrong | None:
        answer = answers[0].strip().strip("().").upper()
        if len(answer) != 1 or answer not in self.choices:
            raise BadAnswer(
                f"the answer is {answers[0]!r}, which is none of {', '.join(self.choices)}. "
                f"Correct the column {self.answer_field!r}, or set reward.choices"
            )
        chosen, problem = self.choice(completion)
        if chosen == answer:
            return None
        return Wrong(problem or f"Your choice {chosen} is wrong.", f"The correct choice is {answer}.")
