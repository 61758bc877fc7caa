"""Several rewards at once."""

from collections.abc import Mapping, Sequence
from typing import Any

from selfdistill.errors import UserError
from selfdistill.rewards.base import AsksPolicy, Result, Reward, RewardFunction, is_verifiable
from selfdistill.rewards.result import normalise
from selfdistill.rewards.scorer import PolicyScorer


class Mix(Reward):
    """A weighted sum of named rewards.

    `parts` lists (name, reward, weight), so that a trainer can log and scale each by itself. Called as a whole it gives
    the weighted sum over the rewards that apply, None where none does, and the feedback of all, line by line.

    Args:
        rewards: name → reward function.
        weights: name → weight; a reward without one has weight 1.
    """

    def __init__(self, rewards: Mapping[str, Any], weights: Mapping[str, float] | None = None) -> None:
        weights = dict(weights or {})
        if not rewards:
            raise UserError("reward.rewards is empty; name at least one reward")
        if unknown := sorted(set(weights) - set(rewards)):
            raise UserError(
                f"reward.weights names {', '.join(unknown)}, which reward.rewards does not have "
                f"({', '.join(rewards)}); to leave it out write ~reward.weights.{unknown[0]}"
            )
        for name, function in rewards.items():
            if not callable(function):
                raise UserError(f"reward.rewards.{name} is {function!r}, not a function; give it a _target_")
        self.parts: list[tuple[str, RewardFunction, float]] = [
            (str(name), function, float(weights.get(name, 1.0))) for name, function in rewards.items()
        ]

    @property
    def judge(self) -> RewardFunction | None:
        """The first part that tells right from wrong, which is what an evaluation asks for."""
        return next((function for _, function, _ in self.parts if is_verifiable(function)), None)

    def bind(self, scorer: PolicyScorer) -> None:
        """Hand the policy to every part that asks for it."""
        for _, function, _ in self.parts:
            if isinstance(function, AsksPolicy):
                function.bind(scorer)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Result]:
        totals: list[float | None] = [None] * len(completions)
        words: list[list[str]] = [[] for _ in completions]
        for name, function, weight in self.parts:
            result = function(prompts=prompts, completions=completions, **columns)
            scores, feedback = normalise(result, name, len(completions), function)
            for row, (score, text) in enumerate(zip(scores, feedback, strict=True)):
                if score is not None:
                    totals[row] = (totals[row] or 0.0) + weight * score
                if text:
                    words[row].append(text)
        return [
            {"score": total, "feedback": "\n".join(texts) or None} for total, texts in zip(totals, words, strict=True)
        ]
