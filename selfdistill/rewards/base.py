"""What every reward shares: its name, its columns, and for some the policy that scores.

A reward is called as TRL calls one and returns one entry per completion: a float, None (not scorable; the row
leaves the group's baseline), or {"score", "feedback"}.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.rewards.scorer import PolicyScorer

Result = float | None | dict[str, Any]


class Reward:
    """A callable that judges completions: `reward(prompts=…, completions=…, completion_ids=…, **columns)`.

    Its `__name__` is what logs call it (`ExactMatch` → `exact_match`).
    """

    @property
    def __name__(self) -> str:  # type: ignore[override]
        return re.sub(r"(?<!^)(?=[A-Z])", "_", str(type(self).__name__)).lower()

    def __call__(self, *args: Any, **columns: Any) -> Sequence[Result]:
        raise NotImplementedError


class PolicyReward(Reward):
    """A reward that asks the current policy for log-probabilities. `bind` gives it the policy before the first call."""

    _scorer: PolicyScorer | None = None

    def bind(self, scorer: PolicyScorer) -> None:
        """Use this scorer from now on."""
        self._scorer = scorer

    @property
    def scorer(self) -> PolicyScorer:
        if self._scorer is None:
            raise ValueError(f"{type(self).__name__} needs the policy: call bind(PolicyScorer(model, tokenizer)) first")
        return self._scorer

    def _token_ids(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_ids: Sequence[Sequence[int]] | None,
        completion_ids: Sequence[Sequence[int]] | None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The ids as given; only what is missing (a caller other than our trainer) is encoded from text."""
        if prompt_ids is None:
            prompt_ids = self.scorer.encode_prompts(prompts)
        if completion_ids is None:
            completion_ids = self.scorer.encode_completions(completions)
        return [list(ids) for ids in prompt_ids], [list(ids) for ids in completion_ids]


def check_policy_logprobs(policy_logprobs: Sequence[Tensor], completion_ids: Sequence[Sequence[int]]) -> None:
    """Raises ValueError unless there is one log-probability for each completion token."""
    given, wanted = [len(row) for row in policy_logprobs], [len(ids) for ids in completion_ids]
    if given != wanted:
        raise ValueError(f"policy_logprobs has {given} values a row, the completions have {wanted} tokens")


def answers_of(columns: Mapping[str, Any], field: str, count: int, reward: str) -> list[list[str]]:
    """All accepted answers of each row: the value (or list) in column `field`, or where that is None `golden_response`.

    A row without either has an empty list. Raises UserError when neither column is there at all.
    """
    if field not in columns and "golden_response" not in columns:
        known = ", ".join(sorted(key for key, value in columns.items() if isinstance(value, list))) or "none"
        raise UserError(
            f"reward {reward} needs the column {field!r}, and the dataset does not have it (columns: {known}). "
            f"Name the right column with reward.answer_field=NAME, or choose a reward that needs no answer."
        )
    nothing = [None] * count
    first, second = columns.get(field) or nothing, columns.get("golden_response") or nothing
    return [_as_texts(a if a is not None else b) for a, b in zip(first, second, strict=True)]


def _as_texts(value: Any) -> list[str]:
    if value is None:
        return []
    values = value if isinstance(value, list | tuple) else [value]
    return [str(item) for item in values if item is not None]


def shorten(text: str, characters: int) -> str:
    """The text within a budget, its middle replaced by an ellipsis when it is longer."""
    if len(text) <= characters:
        return text
    head = (characters - 3) * 2 // 3
    return f"{text[:head]}...{text[len(text) - (characters - 3 - head) :]}"
