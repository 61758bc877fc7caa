"""Reward functions as the trainer calls them."""

from functools import partial
from typing import Any

from selfdistill.rewards.adapter import ROLLOUTS, adapt
from selfdistill.rollout import Rollouts


def brevity(completions: list, limit: int, **_: Any) -> list[float]:
    brevity.last_feedback = ["Be shorter." if len(c) > limit else None for c in completions]  # type: ignore[attr-defined]
    return [float(len(c) <= limit) for c in completions]


def test_what_hydra_makes_of_a_function_keeps_its_name_and_its_feedback() -> None:
    rewards, weights = adapt([partial(partial(brevity), limit=2)])
    assert weights is None
    (reward,) = rewards
    assert reward.__name__ == "brevity"
    rollouts = Rollouts.of_rows([{"prompt": "a"}, {"prompt": "b"}], 1)
    assert reward(prompts=["a", "b"], completions=["xx", "xxx"], **{ROLLOUTS: [rollouts] * 2}) == [1.0, 0.0]
    assert rollouts.feedback == [None, "Be shorter."]
