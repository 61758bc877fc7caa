"""A training that ends when its seconds or tokens are spent."""

import json
import shutil
import time
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from selfdistill.config import check
from selfdistill.errors import UserError
from selfdistill.runs.budget import Budget
from tests.command import command, composed

ARGS = TrainingArguments(output_dir="unused", report_to=[], use_cpu=True)


def step(budget: Budget, clock: list[float], seconds: float) -> bool:
    """Takes a step of so many seconds, and some that belong to none; returns whether the training ends."""
    control = TrainerControl()
    budget.on_step_begin(ARGS, TrainerState(), control)
    clock[0] += seconds
    budget.on_step_end(ARGS, TrainerState(), control)
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
    second.on_train_begin(ARGS, kept, TrainerControl())
    assert step(second, clock, 3.0)


def test_a_budget_may_decide_alone() -> None:
    run = check(composed(["max_steps=null", "budget_s=60"]), ["max_steps=null", "budget_s=60"])
    assert (run.max_steps, run.budget_s) == (None, 60.0)
    with pytest.raises(UserError, match="write max_steps=100, epochs=3 or budget_s=600"):
        check(composed(["max_steps=null"]))
    with pytest.raises(UserError, match="needs to know the number of steps"):
        check(composed(["max_steps=null", "budget_tokens=10", "training.lr_scheduler_type=cosine"]))


def test_a_run_whose_budget_is_spent_takes_no_step_more(clock: list[float]) -> None:
    budget, control, kept = Budget(10.0, None, lambda: 0), TrainerControl(), TrainerState(stateful_callbacks=[])
    kept.stateful_callbacks = {"Budget": {"attributes": {"spent_s": 9.0}}}
    budget.on_train_begin(ARGS, kept, control)
    assert not control.should_training_stop
    kept.stateful_callbacks = {"Budget": {"attributes": {"spent_s": 10.0}}}
    budget.on_train_begin(ARGS, kept, control)
    assert control.should_training_stop


@pytest.mark.long
def test_a_run_ends_regularly_when_its_tokens_are_spent_also_after_an_interruption(tmp_path: Path) -> None:
    short = ["max_steps=null", "completions_per_step=8", "rollout.max_completion_tokens=4", "hardware=cpu"]
    short += ["logger=none", "eval.max_rows=4", "eval.max_rows_per_suite=2", "training.checkpoint_every=1"]
    for tokens in (40, 90):
        typed = [*short, f"budget_tokens={tokens}", f"hydra.run.dir=run-{tokens}"]
        assert command(typed, tmp_path).code == 0
    run, whole = tmp_path / "run-40", tmp_path / "run-90"
    assert command(["resume=run-40", "budget_tokens=90"], tmp_path).code == 0
    spent = {
        path: [line["tokens/generated"] for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())]
        for path in (run, whole)
    }
    assert spent[run] == spent[whole]
    assert spent[whole][-2] < 90 <= spent[whole][-1]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert "eval/accuracy" in summary["eval"]["after"]
    assert _steps(whole, "completions")[-1] == _steps(whole, "metrics")[-1]

    # As a kill in the final evaluation leaves it: the checkpoint of the last step is whole, and nothing came after it.
    before, last = {"before": summary["eval"]["before"]}, json.loads((whole / "summary.json").read_text())
    (whole / "summary.json").write_text(json.dumps({**last, "status": "running", "eval": before}))
    shutil.rmtree(whole / "model")
    steps = _steps(whole, "metrics"), _steps(whole, "completions")
    assert command(["resume=run-90"], tmp_path).code == 0
    assert (_steps(whole, "metrics"), _steps(whole, "completions")) == steps
    assert (whole / "model").is_dir()
    refused = command(["resume=run-90", "budget_tokens=90"], tmp_path)
    assert refused.code == 2
    assert "is finished: all of its" in refused.err and "resume=run-90 budget_tokens=180" in refused.err


def _steps(run: Path, log: str) -> list[int]:
    return [json.loads(line)["step"] for line in (run / f"{log}.jsonl").read_text().splitlines()]
