"""The evaluations of a run: before the training, during it, and after it."""

from collections.abc import Callable
from typing import Any

from torch.nn import Module
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selfdistill.evaluation.evaluator import Evaluator, forgetting
from selfdistill.runs.record import NoRecord


class Evaluations(TrainerCallback):
    """Evaluates the model, compares it with the start, and enters the metrics into the record.

    Every process evaluates the same rows with the same weights, and so each knows the outcome: a model that is sharded
    runs only in all processes together, and none of them waits for the main one in a collective operation, which would
    give up during a long evaluation.

    Args:
        every: optimizer steps between two evaluations during the training; 0: none.
        before: metrics of the start, where a resumed run has them already.
        tell: called with the metrics of each evaluation during the training.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        tokenizer: PreTrainedTokenizerBase,
        record: NoRecord,
        *,
        every: int,
        before: dict[str, float] | None,
        tell: Callable[[dict[str, float]], None],
    ) -> None:
        self.evaluator, self.tokenizer, self.record = evaluator, tokenizer, record
        self.every, self.before, self.tell = every, before, tell
        self._latest: tuple[int, dict[str, float]] | None = None

    def again(self, model: Module) -> dict[str, float]:
        """The metrics of a model that is not that of the last step; they are not entered into the record."""
        with self.record.busy("evaluating"):
            return self._compared(self.evaluator.evaluate(model, self.tokenizer).metrics)

    def _compared(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics with what was forgotten since the start."""
        forgotten = forgetting(self.before or metrics, metrics)
        compared = metrics if forgotten is None else {**metrics, "eval/forgetting": forgotten}
        self.before = self.before or compared
        return compared

    def at(self, step: int, model: Module) -> dict[str, float]:
        """The metrics of the model after `step`, which is evaluated once."""
        if self._latest is None or self._latest[0] != step:
            with self.record.busy("evaluating"):
                evaluation = self.evaluator.evaluate(model, self.tokenizer)
            metrics = self._compared(evaluation.metrics)
            self.record.evaluation(step, metrics, evaluation.items)
            self._latest = step, metrics
        return self._latest[1]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Evaluates the start of a sharded model, which is put onto its devices only when the training begins."""
        if self.before is None:
            self.tell(self.at(0, event["model"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self.tell(self.at(state.global_step, event["model"]))
