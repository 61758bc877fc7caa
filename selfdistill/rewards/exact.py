"""Whether the completion is the answer."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from selfdistill.errors import UserError
from selfdistill.rewards.base import Result, Reward, answers_of, shorten
from selfdistill.rollout import text_of

# The embedded model was trained on exactly this wording (experiments/embedded_model).
FEEDBACK_WITH_ANSWER = "Your answer {completion} is wrong. The correct answer is {answer}."
FEEDBACK_WITHOUT_ANSWER = "Your answer {completion} is wrong."

Normalize = Literal["strip", "none", "lower"]
Feedback = Literal["none", "verdict", "answer"]


def check_feedback(feedback: str) -> None:
    """Raises UserError for a `feedback` that is none of none, verdict, answer."""
    if feedback not in get_args(Feedback):
        raise UserError(f"reward.feedback is {feedback!r}; write one of {', '.join(get_args(Feedback))}")


class ExactMatch(Reward):
    """1 where the completion equals an accepted answer, otherwise 0; None where the row has no answer.

    Args:
        answer_field: the column with the answer, or with a list of accepted ones; where its value is None, the row's
            `golden_response` is the list.
        normalize: `strip` ignores surrounding white space, `lower` also upper and lower case, `none` nothing.
        contains: enough that the answer occurs in the completion.
        feedback: what a wrong completion is told: nothing (plain floats come back), that it is wrong (`verdict`), or
            also the `answer`. A correct one is told nothing.
        feedback_characters: budget of the completion, and of the answer, within the feedback.
    """

    def __init__(
        self,
        answer_field: str = "answer",
        normalize: str = "strip",
        contains: bool = False,
        feedback: str = "none",
        feedback_characters: int = 1000,
    ) -> None:
        if normalize not in get_args(Normalize):
            raise UserError(f"reward.normalize is {normalize!r}; write one of {', '.join(get_args(Normalize))}")
        check_feedback(feedback)
        if feedback_characters < 10:
            raise UserError(f"reward.feedback_characters is {feedback_characters}; write at least 10")
        self.answer_field = answer_field
        self.normalize = normalize
        self.contains = contains
        self.feedback = feedback
        self.feedback_characters = feedback_characters

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Result]:
        accepted = answers_of(columns, self.answer_field, len(completions), self.__name__)
        return [self._judge(text_of(c), answers) for c, answers in zip(completions, accepted, strict=True)]

    def _judge(self, completion: str, answers: list[str]) -> Result:
        if not answers:
            return None
        given, wanted = self._normal(completion), [self._normal(answer) for answer in answers]
        # An empty text occurs in every completion; as an answer it must be met exactly.
        right = any(given == a or (self.contains and a != "" and a in given) for a in wanted)
        if self.feedback == "none":
            return float(right)
        return {"score": float(right), "feedback": None if right else self._told(completion, answers[0])}

    def _normal(self, text: str) -> str:
        if self.normalize == "none":
            return text
        return text.strip().lower() if self.normalize == "lower" else text.strip()

    def _told(self, completion: str, answer: str) -> str:
        template = FEEDBACK_WITH_ANSWER if self.feedback == "answer" else FEEDBACK_WITHOUT_ANSWER
        budget = self.feedback_characters
        return template.format(completion=shorten(completion.strip(), budget), answer=shorten(answer.strip(), budget))
