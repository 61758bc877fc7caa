"""Whether a completion has the form that was asked for, whatever it says."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfdistill.errors import UserError
from selfdistill.rewards.base import Result, Reward
from selfdistill.rollout import text_of


@dataclass(eq=False)
class Form(Reward):
    """1 for a completion in which a pattern is found, 0 for another; beside a reward that judges what it says.

    Args:
        pattern: a regular expression of Python, in which a dot also stands for a line break.
        feedback: what is said about a completion without it; `none` says nothing.

    Raises:
        UserError: the pattern is none.
    """

    pattern: str = r"<answer>[^<]*</answer>\s*\Z"
    feedback: str = "none"

    def __post_init__(self) -> None:
        try:
            self._found = re.compile(self.pattern, re.DOTALL).search
        except re.error as error:
            raise UserError(f"reward.pattern={self.pattern!r} is no regular expression: {error}") from None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Result]:
        scores = [float(self._found(text_of(completion)) is not None) for completion in completions]
        if self.feedback == "none":
            return list(scores)
        return [{"score": score, "feedback": None if score else self.feedback} for score in scores]
