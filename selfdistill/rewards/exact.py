"""Whether the completion is the answer."""

from dataclasses import dataclass
from typing import Literal, get_args

from selfdistill.errors import UserError
from selfdistill.rewards.base import Judge, Wrong, check_choice, shorten

# The embedded model was trained on exactly this wording (experiments/embedded_model).
VERDICT = "Your answer {completion} is wrong."
ANSWER = "The correct answer is {answer}."

Normalize = Literal["strip", "none", "lower"]


@dataclass(eq=False)
class ExactMatch(Judge):
    """Right is a completion that equals an accepted answer.

    Args:
        answer_field, feedback: see `Judge`.
        normalize: `strip` ignores surrounding white space, `lower` also upper and lower case, `none` nothing.
        contains: enough that the answer occurs in the completion.
        feedback_characters: how much of the completion, and of the answer, the feedback quotes at most.
    """

    feedback: str = "none"
    normalize: str = "strip"
    contains: bool = False
    feedback_characters: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("normalize", self.normalize, get_args(Normalize))
        if self.feedback_characters < 10:
            raise UserError(f"reward.feedback_characters is {self.feedback_characters}; write at least 10")

    def judge(self, completion: str, answers: list[str]) -> Wrong | None:
        given, wanted = self._normal(completion), [self._normal(answer) for answer in answers]
        # An empty text occurs in every completion; as an answer it must be met exactly.
        if any(given == a or (self.contains and a != "" and a in given) for a in wanted):
            return None
        quoted, answer = (shorten(text.strip(), self.feedback_characters) for text in (completion, answers[0]))
        return Wrong(VERDICT.format(completion=quoted), ANSWER.format(answer=answer))

    def _normal(self, text: str) -> str:
        if self.normalize == "none":
            return text
        return text.strip().lower() if self.normalize == "lower" else text.strip()
