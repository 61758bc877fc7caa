from types import SimpleNamespace
from typing import Any

import pytest

from selfdistill.evaluation.evaluator import Evaluation
from selfdistill.runs.evaluations import Evaluations
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.record import NoRecord


class Declining:
    """Stands in for an evaluator: each time it is asked the model has forgotten more."""

    def __init__(self) -> None:
        self.calls = 0

    def evaluate(self, model: Any, tokenizer: Any) -> Evaluation:
        self.calls += 1
        lost = 0.1 * (self.calls - 1)
        return Evaluation(0.2 * self.calls, {"sort": 1.0 - lost, "last": 0.5}, 0.75 - lost / 2, [])


class Remembering(NoRecord):
    def __init__(self) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.entries.append((step, metrics))


def test_a_step_is_evaluated_once_and_compared_with_the_start() -> None:
    evaluator, record, told = Declining(), Remembering(), []
    evaluations = Evaluations(evaluator, None, record, every=2, before=None, tell=told.append)
    start = evaluations.at(0, None)
    assert start["eval/forgetting"] == 0.0
    for step in range(1, 5):
        evaluations.on_step_end(None, SimpleNamespace(global_step=step), None)
    end = evaluations.at(4, None)
    assert evaluator.calls == 3
    assert [step for step, _ in record.entries] == [0, 2, 4]
    assert told == [metrics for _, metrics in record.entries[1:]]
    assert evaluations.before == start
    assert end["eval/forgetting"] == pytest.approx(0.1)
    assert end["eval/accuracy"] == pytest.approx(0.6)


def test_a_resumed_run_is_compared_with_its_own_start() -> None:
    before = {"eval/accuracy": 0.1, "eval/retention/sort": 1.0, "eval/retention/last": 1.0, "eval/retention": 1.0}
    evaluations = Evaluations(Declining(), None, Remembering(), every=0, before=before, tell=lambda metrics: None)
    evaluations.on_step_end(None, SimpleNamespace(global_step=6), None)
    assert evaluations.at(6, None)["eval/forgetting"] == pytest.approx(0.25)


def test_the_record_of_other_processes_writes_nothing(tmp_path: Any) -> None:
    from omegaconf import OmegaConf

    run = RunFolder.create(tmp_path, "r", OmegaConf.create({}))
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    record: Any = NoRecord(RunFolder.open(run.path, write=False))
    record.begin(None)
    assert record.callbacks(None) == []
    with record.busy("evaluating"):
        record.start({"eval/accuracy": 1.0})
    record.evaluation(1, {"eval/accuracy": 1.0})
    record.rollouts(None, None, None, {})
    record.end(None, interrupted=False, before=None, after=None)
    record.end_early(None)
    record.close()
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before
    run.finish("finished")
