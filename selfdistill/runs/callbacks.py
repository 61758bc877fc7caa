"""What happens beside the training loop: the record, sampled completions, the alarms.

Only the main process has these callbacks, except for `GeneratedTokens`, and `MainDecides` where several train.
"""

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.text import Text
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import ProgressCallback as TransformersProgressCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selfdistill.errors import UserError
from selfdistill.evaluation.monitors import Alarm, Monitors, standard_names
from selfdistill.rollout import Rollouts
from selfdistill.runs.budget import Budget
from selfdistill.runs.console import differing, samples_table
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.loggers.base import RunLogger
from selfdistill.runs.step_log import jsonable
from selfdistill.training.reporting import TOTALS

Metrics = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]

# How often summary.json is renewed during the training: the summary of a killed run is at most this old.
HEARTBEAT_S = 10.0
# Tokens that the policy has sampled since the run began, on all processes: an x-axis for runs of different speed.
GENERATED = "tokens/generated"


def use_callbacks(trainer: Trainer, callbacks: Sequence[TrainerCallback]) -> None:
    """Give a trainer these callbacks, in this order, instead of transformers' own progress bar and printer."""
    trainer.remove_callback(TransformersProgressCallback)
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)


class GeneratedTokens(TrainerCallback, ExportableState):
    """Counts the tokens that were generated; checkpoints hold the count, so that a resumed run goes on from there.

    Attributes:
        count: tokens of sampled completions since the run began, on all processes.
    """

    def __init__(self) -> None:
        self.count = self._at_step_begin = 0

    def add(self, rollouts: Rollouts) -> None:
        """Counts the completions of a step, of all processes; those that were taken from the data are left out."""
        sampled = zip(rollouts.completion_ids, rollouts.demonstrated, strict=True)
        self.count += sum(len(ids) for ids, demonstrated in sampled if not demonstrated)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"count": self.count}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        states: Any = state.stateful_callbacks or {}  # a list until it is constructed
        kept = states.get(type(self).__name__)
        self.count = kept["attributes"]["count"] if kept else 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._at_step_begin = self.count

    def restore(self) -> None:
        """Forgets the step that has begun, which a resumed run repeats."""
        self.count = self._at_step_begin


class RecordCallback(TrainerCallback):
    """Writes every logged step to the run's folder and to the logger, and drops the steps that a resumed run repeats.

    A metric has one name, the standard one. The totals that transformers logs when the training ends (train_runtime and
    so on) belong to no step and go to the summary.
    """

    def __init__(
        self, run: RunFolder, logger: RunLogger, tokens: GeneratedTokens, budget: Budget | None = None
    ) -> None:
        self.run, self.logger, self.tokens, self.budget = run, logger, tokens, budget
        self._warned = False
        self._summarised = float("-inf")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.run.truncate_metrics(state.global_step)
        # What a killed run had no time to hand over stands in its folder.
        self.show(lambda: self.logger.catch_up(self.run.metrics(), self.run.completions()))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        logs: Metrics = event["logs"]
        if TOTALS in logs:
            totals = {name: value for name, value in logs.items() if name.startswith("train_") or name == "total_flos"}
            self.run.update_summary(train=totals)
            return
        self.enter(state.global_step, standard_names(logs))
        if time.monotonic() - self._summarised > HEARTBEAT_S:
            self._summarised = time.monotonic()
            self.run.update_summary(step=state.global_step, **self.totals())

    def enter(self, step: int, metrics: Metrics) -> None:
        """Metrics of a step, with how many tokens were generated and how many seconds had passed by then."""
        spent: dict[str, float] = {GENERATED: self.tokens.count}
        if self.budget is not None:
            spent["time/training_s"] = round(self.budget.spent_s, 3)
        self.run.log_metrics(step, {**metrics, **spent})
        line = {**metrics, **spent, "time/total_s": self.run.wall_s}
        self.show(lambda: self.logger.log(step, line))

    def totals(self) -> dict[str, Any]:
        """What stands in the summary besides the time: the generated tokens."""
        return {"tokens_generated": self.tokens.count}

    def show(self, call: Callable[[], None]) -> None:
        """Calls the logger, whose failure does not end the training: a warning says so once."""
        try:
            call()
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a third party's logger does
            if not self._warned:
                warnings.warn(f"The logger failed; {self.run.path} has the metrics: {error}", stacklevel=2)
            self._warned = True


class CompletionsCallback(TrainerCallback):
    """Keeps and shows completions of the first step, every so many steps, and of the last one.

    Those that are chosen differ from each other as far as there are different ones.

    Args:
        record: gives the folder and the logger; it comes before this callback.
        console: where the table is printed.
        rows: returns the latest step's completions: mappings with prompt, completion, reward, feedback, advantage.
        every_steps: steps between; 0: only the first and the last.
        keep: completions kept each time.
        show: completions printed each time.
        interrupted: whether the training ends before its time.
    """

    def __init__(
        self,
        record: RecordCallback,
        console: Console,
        rows: Callable[[], Rows],
        every_steps: int = 20,
        keep: int = 16,
        show: int = 3,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.record, self.console, self.rows = record, console, rows
        self.every_steps, self.keep, self.show, self.interrupted = every_steps, keep, show, interrupted
        self._kept: int | None = None  # the step whose completions were kept last
        self._sampled_before: Rows = []  # by the process that a resumed run goes on from

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        steps = {line["step"] for line in self.record.run.completions()}
        self._kept = max((step for step in steps if step < state.global_step), default=None)
        if self._is_due(state.global_step):
            self._kept = max(steps, default=None)
        else:  # those of the end, which is not the end any more, or was not written whole
            self.record.run.truncate_completions(state.global_step - 1)
        file = self._file(args, state)
        self._sampled_before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A run that is resumed amid steps that share rollouts shows them at its next step, as an unbroken one does.
        text = json.dumps(jsonable(self._latest()))
        self._file(args, state).write_text(text, encoding="utf-8")

    def _file(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", "completions.json")

    def _latest(self) -> Rows:
        return differing(self.rows(), self.keep) or self._sampled_before

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._is_due(state.global_step):
            self._keep(state.global_step)

    def _is_due(self, step: int) -> bool:
        kept = self._kept
        return kept is None or bool(self.every_steps and step // self.every_steps > kept // self.every_steps)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.interrupted():  # such a run is resumed, and then has what an unbroken one has
            self._keep(state.global_step)

    def _keep(self, step: int) -> None:
        rows = self._latest()
        if step == 0 or step == self._kept or not rows:
            return
        self._kept = step
        self.record.run.log_completions(step, rows)
        self.record.show(lambda: self.record.logger.table("completions", step, rows))
        self.console.print(samples_table(step, rows[: self.show]))


class MonitorCallback(TrainerCallback):
    """Raises the monitors' alarms, and keeps the best checkpoint of a run that a monitor may stop.

    What is best is decided by eval/accuracy where the run evaluates, otherwise by the mean reward of the last
    `window` logged steps; steps at which any monitor is alarmed are not candidates, because a reward that is being
    exploited is at its highest when the run is worth least. A new best makes the trainer save a checkpoint, by reward
    at most once in `gap_steps` steps, and is entered as the trainer's best one, which keeps it from being rotated away.

    A resumed run reads its metrics again, so that its alarms are those of an unbroken run.

    Attributes:
        stopped_by: the alarm that ended the training; None if none did.
        best_step: step of the best checkpoint; None before there is one.
    """

    def __init__(
        self, monitors: Monitors, run: RunFolder, console: Console, window: int = 5, gap_steps: int = 20
    ) -> None:
        self.monitors, self.run, self.console = monitors, run, console
        self.window, self.gap_steps = window, gap_steps
        self.stopped_by: Alarm | None = None
        self._forget()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.monitors.reset()
        self._forget()
        for line in self.run.metrics():
            if line["step"] <= state.global_step:
                # Where it was stopped before its end could be written, it is stopped again.
                stops = [alarm for alarm in self.monitors.observe(line) if alarm.action == "stop"]
                self.stopped_by = self.stopped_by or next(iter(stops), None)
                self._is_best(line["step"], line)
        control.should_training_stop |= self.stopped_by is not None
        if alarms := self.run.summary.get("alarms"):
            self.run.update_summary(alarms=[alarm for alarm in alarms if alarm["step"] <= state.global_step])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        logs: Metrics = event["logs"]
        if TOTALS in logs:
            return
        step = state.global_step
        for alarm in self.monitors.observe({**logs, "step": step}):
            self._raise(alarm, control)
        if self.stopped_by is None and self._is_best(step, logs):
            control.should_save = True
            state.best_global_step, state.best_metric = step, self._best

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        self.on_log(args, state, control, logs=event["metrics"])

    def _forget(self) -> None:
        self._best: float | None = None
        self._by_accuracy = False
        self._rewards: list[float] = []
        self.best_step: int | None = None

    def _raise(self, alarm: Alarm, control: TrainerControl) -> None:
        if alarm.action == "stop" and self.stopped_by is None:
            self.stopped_by = alarm
            control.should_training_stop = True
        word = "stopped" if alarm.action == "stop" else "warning"
        self.console.print(Text(f"{word} at step {alarm.step}: {alarm.message}", style="bold yellow"))
        self.run.update_summary(alarms=[*self.run.summary.get("alarms", []), asdict(alarm)])

    def _is_best(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether a checkpoint of this step should be kept as the best."""
        accuracy = metrics.get("eval/accuracy")
        if accuracy is not None and not self._by_accuracy:
            # From the first evaluation on, rewards no longer decide.
            self._by_accuracy, self._best = True, None
        value = accuracy if self._by_accuracy else self._mean_reward(metrics.get("reward"))
        if not self.monitors.can_stop or value is None or self.monitors.alarming:
            return False
        too_soon = self.best_step is not None and step - self.best_step < self.gap_steps and not self._by_accuracy
        if too_soon or (self._best is not None and value <= self._best):
            return False
        self._best = value
        if step == 0:  # the model is still as it was given
            return False
        self.best_step = step
        return True

    def _mean_reward(self, reward: float | None) -> float | None:
        if reward is None:
            return None
        self._rewards = [*self._rewards, reward][-self.window :]
        return sum(self._rewards) / len(self._rewards) if len(self._rewards) == self.window else None


class MainDecides(TrainerCallback):
    """Lets every process stop and save where the main one does, whose monitors judge what was logged. Comes last."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        decision = [control.should_save, control.should_training_stop, state.best_global_step, state.best_metric]
        control.should_save, control.should_training_stop, state.best_global_step, state.best_metric = (
            broadcast_object_list(decision)
        )

    on_train_begin = on_evaluate = on_log
