"""Between rewards that may give feedback and TRL, which wants numbers."""

import inspect
from collections.abc import Sequence
from functools import partial
from logging import getLogger
from typing import Any

from torch import nn

from selfdistill.errors import UserError
from selfdistill.rewards.base import AsksPolicy, RewardFunction
from selfdistill.rewards.mix import Mix
from selfdistill.rewards.result import normalise
from selfdistill.rewards.scorer import PolicyScorer
from selfdistill.rollout import Rollouts

# TRL prints a row's columns in every step in which no reward applies to it; the monitors say so once.
getLogger("trl.trainer.grpo_trainer").addFilter(
    lambda record: "All reward functions returned None" not in record.getMessage()
)

# The column in which the trainer passes the whole batch. The function gets what is known of it, and its feedback is
# written onto it.
ROLLOUTS = "_rollouts"


class AdaptedReward:
    """A reward function as TRL calls it: it returns the scores, and writes the feedback onto the rollouts."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        self.__name__ = name
        self.function = function

    def bind(self, scorer: PolicyScorer) -> None:
        """Hands the policy to a function that asks for it."""
        if isinstance(self.function, AsksPolicy):
            self.function.bind(scorer)

    def __call__(self, prompts: list, completions: list, **columns: Any) -> Sequence[float | None]:
        rollouts = _take_rollouts(columns)
        result = self.function(prompts=prompts, completions=completions, **columns)
        return self._scores(result, rollouts)

    def _scores(self, result: Any, rollouts: Rollouts) -> Sequence[float | None]:
        scores, feedback = normalise(result, self.__name__, len(rollouts), _inner(self.function))
        rollouts.add_feedback(feedback)
        return scores


class AsyncAdaptedReward(AdaptedReward):
    """The same for a coroutine function, which TRL awaits."""

    async def __call__(self, prompts: list, completions: list, **columns: Any) -> Sequence[float | None]:  # type: ignore[override]
        rollouts = _take_rollouts(columns)
        result = await self.function(prompts=prompts, completions=completions, **columns)
        return self._scores(result, rollouts)


def _take_rollouts(columns: dict[str, Any]) -> Rollouts:
    """Takes the batch out of its column, and adds to the columns what is known of it beyond the dataset."""
    rollouts: Rollouts = columns.pop(ROLLOUTS)[0]
    columns["prompt_ids"] = rollouts.prompt_ids
    if rollouts.policy_logps is not None:
        rows = zip(rollouts.policy_logps, rollouts.completion_ids, strict=True)
        columns["policy_logprobs"] = [logps[: len(ids)] for logps, ids in rows]
    return rollouts


def adapt(reward_funcs: Any) -> tuple[list[Any], list[float] | None]:
    """One adapted reward per function (each part of a `Mix` by itself), and the weights where a mix gives them.

    What only TRL understands, a reward model or its name, stays as it is.
    """
    functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    rewards: list[Any] = []
    weights: list[float] = []
    for function in functions:
        parts = function.parts if isinstance(function, Mix) else [(name_of(function), function, 1.0)]
        for name, part, weight in parts:
            rewards.append(part if isinstance(part, str | nn.Module) else _adapted(name, part))
            weights.append(weight)
    return rewards, weights if any(w != 1.0 for w in weights) else None


def _adapted(name: str, function: Any) -> AdaptedReward:
    if not callable(function):
        raise UserError(f"reward function {function!r} is not callable; give a function, or a reward model's name.")
    coroutine = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return AsyncAdaptedReward(name, function) if coroutine else AdaptedReward(name, function)


def name_of(function: Any) -> str:
    """What a reward is called in the logs."""
    function = _inner(function)
    return getattr(function, "__name__", None) or type(function).__name__


def _inner(function: Any) -> Any:
    """The user's function in what Hydra's `_partial_: true` makes of it."""
    while isinstance(function, partial):
        function = function.func
    return function
