"""A training that ends when its seconds or tokens are spent."""

import time
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from selfdistill.config import check
from selfdistill.errors import UserError
from selfdistill.runs.budget import Budget
from tests.command import composed

ARGS: object = SimpleNamespace(world_size=1)


def step(budget: Budget, clock: list[float], seconds: float) -> bool:
    """Takes a step of so many seconds, and some that belong to none; returns whether the training ends."""
    control = TrainerControl()
    budget.on_step_begin(ARGS, TrainerState(), control)  # type: ignore[arg-type]
    clock[0] += seconds
    budget.on_step_end(ARGS, TrainerState(), control)  # type: ignore[arg-type]
    clock[0] += 100  # an evaluation
    return control.should_training_stop


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_first_step_at_which_the_seconds_are_spent_is_the_last(clock: list[float]) -> None:
    budget = Budget(10.0, None, lambda: 0)
    assert budget.left_s is None
    assert [step(budget, clock, 4.0) for _ in range(2)] == [False, False]
    assert budget.left_s == pytest.approx(2.0)
    assert step(budget, clock, 4.0)
    assert budget.left_s == 0.0


def test_tokens_are_a_budget_too(clock: list[float]) -> None:
    generated = [0]
    budget = Budget(None, 100, lambda: generated[0])
    generated[0] = 60
    assert not step(budget, clock, 3.0)
    assert budget.left_s == pytest.approx(2.0)
    generated[0] = 120
    assert step(budget, clock, 3.0)


def test_without_a_budget_nothing_ends(clock: list[float]) -> None:
    budget = Budget(None, None, lambda: 10**12)
    assert not step(budget, clock, 1e9)
    assert (budget.share, budget.left_s) == (0.0, None)


def test_what_was_spent_before_an_interruption_counts(clock: list[float]) -> None:
    first, second = Budget(10.0, None, lambda: 0), Budget(10.0, None, lambda: 0)
    step(first, clock, 8.0)
    kept = TrainerState(stateful_callbacks=[])
    kept.stateful_callbacks = {"Budget": first.state()}
    second.on_train_begin(ARGS, kept, TrainerControl())  # type: ignore[arg-type]
    assert step(second, clock, 3.0)


def test_a_budget_may_decide_alone() -> None:
    run = check(composed(["max_steps=null", "budget_s=60"]), ["max_steps=null", "budget_s=60"])
    assert (run.max_steps, run.budget_s) == (None, 60.0)
    with pytest.raises(UserError, match="write max_steps=100, epochs=3 or budget_s=600"):
        check(composed(["max_steps=null"]))
    with pytest.raises(UserError, match="needs to know the number of steps"):
        check(composed(["max_steps=null", "budget_tokens=10", "training.lr_scheduler_type=cosine"]))
