from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch.nn import Module
from transformers import TrainerControl, TrainerState, TrainingArguments

from selfdistill.evaluation.evaluator import Evaluation, Evaluator
from selfdistill.rollout import Rollouts
from selfdistill.runs.budget import Budget
from selfdistill.runs.callbacks import GeneratedTokens
from selfdistill.runs.evaluations import Evaluations
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.processes import EarlyEnd
from selfdistill.runs.record import NoRecord
from selfdistill.training.build import Parts
from tests.tiny import tiny_tokenizer


class Declining(Evaluator):
    """Stands in for an evaluator: each time it is asked the model has forgotten more."""

    def __init__(self) -> None:
        self.calls = 0

    def evaluate(self, model: Any, tokenizer: Any) -> Evaluation:
        self.calls += 1
        lost = 0.1 * (self.calls - 1)
        retention = {"eval/retention/sort": 1.0 - lost, "eval/retention/last": 0.5, "eval/retention": 0.75 - lost / 2}
        return Evaluation({"eval/accuracy": 0.2 * self.calls, **retention}, [])


class Remembering(NoRecord):
    def __init__(self) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []

    def evaluation(self, step: int, metrics: dict[str, float], items: Any) -> None:
        self.entries.append((step, metrics))


def evaluations(
    evaluator: Evaluator, record: NoRecord, every: int, before: dict[str, float] | None = None, tell: Any = print
) -> Evaluations:
    return Evaluations(evaluator, tiny_tokenizer(), record, every=every, before=before, tell=tell)


def end_step(callback: Evaluations, step: int, folder: Path) -> None:
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    callback.on_step_end(arguments, TrainerState(global_step=step), TrainerControl(), model=Module())


def test_a_step_is_evaluated_once_and_compared_with_the_start(tmp_path: Path) -> None:
    evaluator, record, told = Declining(), Remembering(), []
    callback = evaluations(evaluator, record, every=2, tell=told.append)
    start = callback.at(0, Module())
    assert start["eval/forgetting"] == 0.0
    for step in range(1, 5):
        end_step(callback, step, tmp_path)
    end = callback.at(4, Module())
    assert evaluator.calls == 3
    assert [step for step, _ in record.entries] == [0, 2, 4]
    assert told == [metrics for _, metrics in record.entries[1:]]
    assert callback.before == start
    assert end["eval/forgetting"] == pytest.approx(0.1)
    assert end["eval/accuracy"] == pytest.approx(0.6)


def test_a_resumed_run_is_compared_with_its_own_start(tmp_path: Path) -> None:
    before = {"eval/accuracy": 0.1, "eval/retention/sort": 1.0, "eval/retention/last": 1.0, "eval/retention": 1.0}
    evaluator, record = Declining(), Remembering()
    callback = evaluations(evaluator, record, every=0, before=before)
    end_step(callback, 6, tmp_path)
    assert evaluator.calls == 0
    assert callback.at(6, Module())["eval/forgetting"] == pytest.approx(0.25)


def test_the_record_of_other_processes_writes_nothing(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "r", OmegaConf.create({}))
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    record, parts = NoRecord(RunFolder.open(run.path, write=False)), object.__new__(Parts)
    record.begin(parts)
    assert record.callbacks(parts, GeneratedTokens(), Budget(None, None, lambda: 0), lambda: False) == []
    with record.busy("evaluating"):
        record.evaluation(0, {"eval/accuracy": 1.0}, [])
    record.rollouts(parts, Rollouts([], [], []))
    record.end(parts, {}, interrupted=False)
    record.end_early(EarlyEnd("failed", 2))
    record.close()
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before
    run.finish("finished")
