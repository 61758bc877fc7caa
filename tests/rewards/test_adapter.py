"""Reward functions as the trainer calls them."""

from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import pytest

from selfdistill.rewards.adapter import ROLLOUTS, adapt
from selfdistill.rollout import Rollouts
from tests.training.naive import make


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


@pytest.mark.parametrize("filtered", [True, False])
def test_trl_does_not_print_the_rows_to_which_no_reward_applies(
    filtered: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not filtered:  # it would, in every step
        monkeypatch.setattr(getLogger("trl.trainer.grpo_trainer"), "filters", [])
    make(tmp_path, args={"max_steps": 1}, reward_funcs=lambda completions, **_: [None] * len(completions))[0].train()
    assert ("All reward functions returned None" in caplog.text) == (not filtered)
