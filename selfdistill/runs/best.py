"""The best checkpoint of a run by a metric, which becomes its model (`keep_best`)."""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selfdistill.config.suggestions import closest
from selfdistill.errors import UserError
from selfdistill.evaluation.monitors import standard_names
from selfdistill.goals import is_more_better
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.processes import Processes
from selfdistill.training.checkpoints import CHECKPOINTS, damage
from selfdistill.training.trainer import SelfDistillTrainer

# A metric of every step is noisy: the mean of so many steps counts, and so many lie between two checkpoints.
WINDOW = 10


class KeepBest(TrainerCallback):
    """Saves a checkpoint whenever the metric is better than ever, and enters its step and value into the state.

    A metric of evaluations is compared as it is, one of training steps as the mean of the last ten.

    Args:
        metric: as it is logged, for example `eval/accuracy` or `reward`.
        folder: the run's; a resumed run finds the metrics of its earlier steps there.

    Raises:
        UserError: nothing of this name is logged.
    """

    def __init__(self, metric: str, folder: RunFolder) -> None:
        self.metric, self.folder = metric, folder
        self._evaluated = metric.startswith("eval/")
        self._sign = 1.0 if is_more_better(metric) else -1.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)
        self._step, self._value = state.best_global_step, state.best_metric
        for line in self.folder.metrics():
            if line["step"] <= state.global_step and line.get(self.metric) is not None:
                self._values.append(line[self.metric])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        if not self._evaluated and "loss" in event["logs"]:
            self._look(event["logs"], state, control)
        # Monitors that may stop a run enter a best step of their own.
        state.best_global_step, state.best_metric = self._step, self._value

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        if self._evaluated:
            self._look(event["metrics"], state, control)
        state.best_global_step, state.best_metric = self._step, self._value

    def _look(self, metrics: Mapping[str, Any], state: TrainerState, control: TrainerControl) -> None:
        named = standard_names(metrics)
        if self.metric not in named:
            raise UserError(f"keep_best={self.metric}: no such metric is logged; {closest(self.metric, named)}")
        self._values.append(named[self.metric])
        value = self._values[-1] if self._evaluated else fmean(self._values)
        soon = self._step is not None and state.global_step - self._step < WINDOW
        ready = self._evaluated or (len(self._values) == WINDOW and not soon)
        if ready and (self._value is None or self._sign * value > self._sign * self._value):
            self._step, self._value = state.global_step, value
            control.should_save = True


def load_best(trainer: SelfDistillTrainer, run: Path, processes: Processes) -> tuple[int | None, str | None]:
    """Puts the best checkpoint's weights into the model, unless they are there already.

    Returns:
        its step, None where the last weights stay; and what is wrong with its checkpoint, where that is the reason.
    """
    step = trainer.state.best_global_step
    if step and step != trainer.state.global_step:
        checkpoint = run / CHECKPOINTS / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        wrong = processes.share(damage(checkpoint) if processes.is_main else None)
        if wrong is not None:  # a model that is not the best one is better than none, and than one of damaged weights
            return None, f"{checkpoint.name} is damaged: {wrong}"
        trainer.state.best_model_checkpoint = str(checkpoint)
        trainer._load_best_model()
    return step, None
