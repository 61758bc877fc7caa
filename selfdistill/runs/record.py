"""What is written down and shown of a run, by its main process alone.

The other processes have a record that does nothing, so that no other code has to ask which process it is in.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import TrainerCallback

from selfdistill.config import Run
from selfdistill.config.permissions import resume_command
from selfdistill.evaluation.evaluator import Item
from selfdistill.models.export import Exported
from selfdistill.rollout import Rollouts
from selfdistill.runs import console
from selfdistill.runs.callbacks import CompletionsCallback, MonitorCallback, ProgressCallback, RecordCallback
from selfdistill.runs.cards import card_for_export
from selfdistill.runs.evaluated import EVALUATION, write_items
from selfdistill.runs.exported import EXPORT, export_command, note_exports
from selfdistill.runs.folder import RunFolder, Status
from selfdistill.runs.loggers import RunLogger
from selfdistill.runs.plan import plan_of
from selfdistill.runs.processes import EarlyEnd
from selfdistill.runs.samples import completion_rows, prompt_samples
from selfdistill.training.build import Parts

MODEL = "model"


class NoRecord:
    """The record of every process but the main one: nothing is written, shown or logged.

    Attributes:
        folder: the run's folder, open for reading.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def begin(self, parts: Parts) -> None:
        """Shows the configuration and the plan, and lists the rows of the data that were skipped."""

    def callbacks(self, parts: Parts) -> list[TrainerCallback]:
        """The callbacks that record the training."""
        return []

    def busy(self, word: str) -> AbstractContextManager[object]:
        """Shows a word while the context lasts."""
        return nullcontext()

    def evaluation(self, step: int, metrics: dict[str, float], items: Sequence[Item]) -> None:
        """Enters an evaluation, its metrics and its rows; later ones are compared with that of step 0."""

    def kept(self, metric: str, step: int | None, value: float | None) -> None:
        """Says which step's weights become the model, where the best ones by a metric were asked for."""

    def rollouts(self, parts: Parts, rollouts: Rollouts) -> None:
        """Keeps a step's completions, of all processes; the first ones are written to prompts.md."""

    def end(self, parts: Parts, evaluations: dict[str, dict[str, float]], *, interrupted: bool) -> None:
        """Exports the saved model, and says where everything lies.

        Args:
            evaluations: metrics `before` and `after` the training; empty where the end was not evaluated.
        """

    def end_early(self, end: EarlyEnd) -> None:
        """Closes a run that failed, or that was interrupted before or after the training."""

    def close(self) -> None:
        """Closes a run that ended in good order."""


class Record(NoRecord):
    """The record of the main process: run folder, logger and screen."""

    def __init__(self, cfg: DictConfig, run: Run, folder: RunFolder, logger: RunLogger) -> None:
        super().__init__(folder)
        self.cfg, self.run, self.logger = cfg, run, logger
        self.screen = console.make_console()
        self._begun = run.resume is not None
        self._prompts_written = False
        self._monitor: MonitorCallback | None = None
        self._rows: list[dict[str, Any]] = []

    def begin(self, parts: Parts) -> None:
        self.logger.start(self.folder, self.cfg)
        self._begun = True
        if evaluated := self.folder.summary.get("eval"):  # of a resumed run, whose end is evaluated again
            self.folder.update_summary(eval={"before": evaluated.get("before")})
        self.folder.write_bad_rows(parts.data.bad_rows)
        self.folder.update_summary(findings=parts.trainer.findings, train_rows=len(parts.data.train))
        console.print_all(self.screen, console.config_tree(self.cfg), console.plan_table(plan_of(self.run, parts)))
        for line in parts.exporter.missing() if parts.exporter is not None else ():
            self.screen.print(f"warning: {line}", markup=False)
        if parts.data.bad_rows:
            self.screen.print(
                f"{len(parts.data.bad_rows)} bad rows skipped, listed in {self.folder.path / 'bad_rows.jsonl'}"
            )

    def callbacks(self, parts: Parts) -> list[TrainerCallback]:
        record = RecordCallback(self.folder, self.logger)
        completions = CompletionsCallback(record, self.screen, lambda: self._rows)
        if parts.monitors is None:
            return [record, completions, ProgressCallback(self.screen)]
        self._monitor = MonitorCallback(parts.monitors, self.folder, self.screen)
        return [record, self._monitor, completions, ProgressCallback(self.screen)]

    def busy(self, word: str) -> AbstractContextManager[object]:
        return self.screen.status(word) if self.screen.is_terminal else nullcontext()

    def evaluation(self, step: int, metrics: dict[str, float], items: Sequence[Item]) -> None:
        write_items(self.folder.path / EVALUATION, step, items)
        if step == 0:
            self.folder.update_summary(eval={"before": metrics})
        self.folder.log_metrics(step, metrics)
        self.logger.log(step, metrics)

    def kept(self, metric: str, step: int | None, value: float | None) -> None:
        if step is None or value is None:
            self.screen.print(f"no step was better than the others by {metric}: model/ is that of the last one")
            return
        self.folder.update_summary(best={"metric": metric, "step": step, "value": value})
        self.screen.print(f"model/ is that of step {step}, the best by {metric}: {value:.3f}")

    def rollouts(self, parts: Parts, rollouts: Rollouts) -> None:
        self._rows = completion_rows(rollouts)
        if not self._prompts_written and not parts.trainer.state.global_step:
            self._prompts_written = True
            if not self.folder.write_prompts(prompt_samples(parts.tokenizer, rollouts)):
                raise RuntimeError(f"student and teacher score different tokens: see {self.folder.path / 'prompts.md'}")

    def end(self, parts: Parts, evaluations: dict[str, dict[str, float]], *, interrupted: bool) -> None:
        step = parts.trainer.state.global_step
        status: Status = "interrupted" if interrupted else "finished"
        if self._monitor is not None and self._monitor.stopped_by is not None:
            status = "stopped"
        places: dict[str, str | Path | None] = {"run": self.folder.path, "model": self.folder.path / MODEL}
        parts.tokenizer.save_pretrained(self.folder.path / MODEL)
        if evaluations:
            self.folder.update_summary(eval=evaluations)
            self.logger.summary(evaluations["after"])
            self.screen.print(console.change_table(_short(evaluations["before"]), _short(evaluations["after"])))
        exported: dict[str, Exported] = {}
        if parts.exporter is not None and status == "finished" and not self.run.dry_run:
            # The model is saved and the evaluation written: whatever happens to an export, the run is whole.
            exported = parts.exporter.run(
                parts.trainer.accelerator.unwrap_model(parts.trainer.model),
                parts.tokenizer,
                self.folder.path / EXPORT,
                parts.data.eval[:8]["prompt"],
                card=card_for_export(parts.trainer.card, self.folder) if parts.trainer.card else None,
                chat_template_kwargs=self.run.model.chat_template_kwargs,
                tell=lambda line: self.screen.print(line, markup=False),
            )
            places |= {name: one.url or one.folder for name, one in exported.items() if one.error is None}
            note_exports(self.folder, exported)
        self.folder.finish(status, step=step)
        places |= {"status": status, "log": self.logger.location}
        if status == "interrupted":
            again = resume_command(self.run, self.folder.path)
            self.screen.print(f"interrupted at step {step}; continue with: {again}", markup=False)
        self.screen.print(console.where_table(places))
        for name, one in exported.items():
            if one.error is not None:
                self.screen.print(f"not exported: {one.error}", markup=False)
                self.screen.print(f"  again: {export_command(self.folder.path, name)}", markup=False)

    def end_early(self, end: EarlyEnd) -> None:
        # A new run that is refused before it has begun (no such model, a malformed file) leaves no folder.
        if end.refused and not self._begun:
            self.folder.discard()
        else:
            self.folder.finish(end.status, end.traceback)
        self.logger.finish(failed=True)

    def close(self) -> None:
        self.logger.finish()


def _short(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval/"): value for name, value in metrics.items()}
