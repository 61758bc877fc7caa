"""Between rewards that may give feedback and TRL, which wants numbers."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from selfdistill.errors import UserError
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
        return self._read(self._ask(prompts, completions, columns), len(completions))

    def _ask(self, prompts: list, completions: list, columns: dict[str, Any]) -> Any:
        return self.function(prompts=prompts, completions=completions, **{**columns, **self.known})

    def _read(self, result: Any, count: int) -> list[float | None]:
        self.scores, self.feedback = normalise(result, self.__name__, count, _inner(self.function))
        return self.scores


class AsyncAdaptedReward(AdaptedReward):
    """The same of a coroutine function, which TRL awaits."""

    async def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:  # type: ignore[override]
        return self._read(await self._ask(prompts, completions, columns), len(completions))


def adapt(reward_funcs: Any) -> tuple[list[Any], list[float] | None]:
    """One adapted reward per function (each part of a `Mix` by itself), and the weights where a mix gives them.

    What only TRL understands, a reward model or its name, stays as it is.
    """
    functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    rewards: list[Any] = []
    weights: list[float] = []
    for function in functions:
        parts = function.parts if isinstance(function, Mix) else [(_name(function), function, 1.0)]
        for name, part, weight in parts:
            rewards.append(part if isinstance(part, str | nn.Module) else _adapted(name, part))
            weights.append(weight)
    return rewards, weights if any(w != 1.0 for w in weights) else None


def _adapted(name: str, function: Any) -> AdaptedReward:
    if not callable(function):
        raise UserError(f"reward function {function!r} is not callable; give a function, or a reward model's name.")
    coroutine = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return AsyncAdaptedReward(name, function) if coroutine else AdaptedReward(name, function)


def _name(function: Any) -> str:
    function = _inner(function)
    return getattr(function, "__name__", None) or type(function).__name__


def _inner(function: Any) -> Any:
    """The user's function in what Hydra's `_partial_: true` makes of it."""
    while isinstance(function, partial):
        function = function.func
    return function
