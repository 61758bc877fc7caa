"""Between rewards that may give feedback and TRL, which wants numbers."""

from collections.abc import Callable
from typing import Any

from selfdistill.rewards.mix import Mix
from selfdistill.rewards.result import normalise


class AdaptedReward:
    """A reward function as TRL calls it; keeps the scores and the feedback of its last call.

    Attributes:
        known: what the trainer knows beyond the dataset's columns (`prompt_ids`, and `policy_logprobs` where there are any).
        scores, feedback: of the last call, one per completion.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.__name__ = name
        self.function = function
        self.known: dict[str, Any] = {}
        self.scores: list[float | None] = []
        self.feedback: list[str | None] = []

    def bind(self, scorer: Any) -> None:
        if hasattr(self.function, "bind"):
            self.function.bind(scorer)

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        result = self.function(prompts=prompts, completions=completions, **columns, **self.known)
        self.scores, self.feedback = normalise(result, self.__name__, len(completions), self.function)
        return self.scores


def adapt(reward_funcs: Any) -> tuple[list[AdaptedReward], list[float] | None]:
    """One adapted reward per function (each part of a `Mix` by itself), and the weights where a mix gives them."""
    functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    rewards: list[AdaptedReward] = []
    weights: list[float] = []
    for function in functions:
        parts = function.parts if isinstance(function, Mix) else [(_name(function), function, 1.0)]
        for name, part, weight in parts:
            rewards.append(AdaptedReward(name, part))
            weights.append(weight)
    return rewards, weights if any(w != 1.0 for w in weights) else None


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or type(function).__name__
