"""What is written down and shown of a run, by its main process alone.

The other processes have a record that does nothing, so that no other code has to ask which process it is in.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import TrainerCallback

from selfdistill.config import Run
from selfdistill.config.checks import without_unread
from selfdistill.config.permissions import resume_command
from selfdistill.errors import UserError
from selfdistill.evaluation.evaluator import Item
from selfdistill.files import replace_folder
from selfdistill.models.export import Exported
from selfdistill.rollout import Rollouts
from selfdistill.runs import console
from selfdistill.runs.budget import Budget
from selfdistill.runs.callbacks import CompletionsCallback, GeneratedTokens, MonitorCallback, RecordCallback
from selfdistill.runs.cards import add_results, card_for_export
from selfdistill.runs.evaluated import EVALUATION, write_items
from selfdistill.runs.exported import EXPORT, export_command, note_exports
from selfdistill.runs.finished import load_policy, read_run
from selfdistill.runs.folder import RunFolder, Status
from selfdistill.runs.labels import defaults, labels_of
from selfdistill.runs.loggers import RunLogger
from selfdistill.runs.plan import plan_of
from selfdistill.runs.processes import EarlyEnd
from selfdistill.runs.samples import completion_rows, prompt_samples
from selfdistill.runs.screen import LOG, Screen, heard
from selfdistill.runs.step_table import StepTable
from selfdistill.training.build import Parts

MODEL = "model"
# What is kept with the run where it is logged, once it is over.
REPORT = ("summary.json", "metrics.jsonl", "completions.jsonl", "evaluation.jsonl", "prompts.md", LOG)


class NoRecord:
    """The record of every process but the main one: nothing is written, shown or logged.

    Attributes:
        folder: the run's folder, open for reading.
        begun: whether there is something to go on from, if the run ends early.
    """

    def __init__(self, folder: RunFolder, *, resumed: bool = False) -> None:
        self.folder, self.begun = folder, resumed

    def say(self, notes: Sequence[str]) -> None:
        """Shows what someone should know who looks on."""

    def begin(self, parts: Parts) -> None:
        """Shows the configuration and the plan, and lists the rows of the data that were skipped."""
        self.begun = True

    def callbacks(
        self, parts: Parts, tokens: GeneratedTokens, budget: Budget, interrupted: Callable[[], bool]
    ) -> list[TrainerCallback]:
        """The callbacks that record the training."""
        return []

    def busy(self, word: str) -> AbstractContextManager[object]:
        """Shows a word while the context lasts."""
        return nullcontext()

    def evaluation(self, step: int, metrics: dict[str, float], items: Sequence[Item]) -> None:
        """Enters an evaluation, its metrics and its rows; later ones are compared with that of step 0."""

    def kept(self, metric: str, step: int | None, value: float | None, damaged: str | None = None) -> None:
        """Says which step's weights become the model, where the best ones by a metric were asked for.

        Args:
            step: None where it is the last one.
            damaged: what is wrong with the best one's checkpoint, where that is the reason.
        """

    def rollouts(self, parts: Parts, rollouts: Rollouts) -> None:
        """Keeps a step's completions, of all processes; the first ones are written to prompts.md."""

    def save_model(self, parts: Parts, draft: Path) -> None:
        """Completes the weights that were saved to `draft`, and puts them in the place of the run's model."""

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
        super().__init__(folder, resumed=run.resume is not None)
        self.cfg, self.run, self.logger = cfg, run, logger
        self.screen = Screen()
        self.screen.keep(folder.path / LOG)
        self._at_end = ExitStack()
        self._at_end.callback(self.screen.close)
        self._at_end.enter_context(heard(self.screen))
        self._recorder = RecordCallback(folder, logger, GeneratedTokens())
        self._prompts_written = False
        self._monitor: MonitorCallback | None = None
        self._rows: list[dict[str, Any]] = []

    def say(self, notes: Sequence[str]) -> None:
        for note in notes:
            self.screen.print(note, markup=False, highlight=False, soft_wrap=True)

    def begin(self, parts: Parts) -> None:
        self._recorder.show(lambda: self.logger.start(self.folder, without_unread(self.cfg, self.run)))
        super().begin(parts)
        self._recorder.show(lambda: self.logger.files("config", self._there("config.yaml", ".hydra/overrides.yaml")))
        if evaluated := self.folder.summary.get("eval"):  # of a resumed run, whose end is evaluated again
            self.folder.update_summary(eval={"before": evaluated.get("before")})
        self.folder.write_bad_rows(parts.data.bad_rows)
        self.folder.update_summary(findings=parts.trainer.findings, train_rows=len(parts.data.train))
        choices = labels_of(self.folder.path).choices
        said = console.differences(self.cfg, *defaults(choices), choices)
        console.print_all(self.screen, said, console.plan_table(plan_of(self.run, parts)))
        self.say([f"warning: {line}" for line in (parts.exporter.missing() if parts.exporter is not None else ())])
        if parts.data.bad_rows:
            self.screen.print(
                f"{len(parts.data.bad_rows)} bad rows skipped, listed in {self.folder.path / 'bad_rows.jsonl'}"
            )

    def callbacks(
        self, parts: Parts, tokens: GeneratedTokens, budget: Budget, interrupted: Callable[[], bool]
    ) -> list[TrainerCallback]:
        self._recorder.tokens, self._recorder.budget, shown = tokens, budget, self.run.show
        table = StepTable(self.screen, lambda: tokens.count, shown.table_rows, budget)
        self._at_end.callback(table.close)
        callbacks: list[TrainerCallback] = [self._recorder, table]
        if parts.monitors is not None:
            self._monitor = MonitorCallback(parts.monitors, self.folder, self.screen)
            callbacks.append(self._monitor)
        kept = shown.completions_every, shown.completions_kept, shown.completions_printed
        sampled = CompletionsCallback(self._recorder, self.screen, lambda: self._rows, *kept, interrupted=interrupted)
        return [*callbacks, sampled]

    def busy(self, word: str) -> AbstractContextManager[object]:
        return self.screen.status(word) if self.screen.is_terminal else nullcontext()

    def evaluation(self, step: int, metrics: dict[str, float], items: Sequence[Item]) -> None:
        write_items(self.folder.path / EVALUATION, step, items)
        self._recorder.enter(step, metrics)
        if step == 0:  # the last thing to do: a resumed run does not evaluate the start again once this is written
            self.folder.update_summary(eval={"before": metrics}, step=0)
        self.screen.print_line(console.evaluation_line(step, metrics))

    def kept(self, metric: str, step: int | None, value: float | None, damaged: str | None = None) -> None:
        if step is None or value is None:
            because = (
                f"warning: the best by {metric}, {damaged}"
                if damaged
                else f"no step was better than the others by {metric}"
            )
            self.say([f"{because}: model/ is that of the last one"])
            return
        self.folder.update_summary(best={"metric": metric, "step": step, "value": value})
        self.screen.print(f"model/ is that of step {step}, the best by {metric}: {value:.3f}")

    def rollouts(self, parts: Parts, rollouts: Rollouts) -> None:
        self._rows = completion_rows(rollouts)
        if not self._prompts_written and not parts.trainer.state.global_step:
            self._prompts_written = True
            if not self.folder.write_prompts(prompt_samples(parts.tokenizer, rollouts)):
                raise RuntimeError(f"student and teacher score different tokens: see {self.folder.path / 'prompts.md'}")

    def save_model(self, parts: Parts, draft: Path) -> None:
        parts.tokenizer.save_pretrained(draft)
        replace_folder(self.folder.path / MODEL, draft)

    def end(self, parts: Parts, evaluations: dict[str, dict[str, float]], *, interrupted: bool) -> None:
        step = parts.trainer.state.global_step
        status: Status = "interrupted" if interrupted else "finished"
        if self._monitor is not None and self._monitor.stopped_by is not None:
            status = "stopped"
        places: dict[str, str | Path | None] = {"run": self.folder.path, "model": self.folder.path / MODEL}
        if evaluations:
            self.folder.update_summary(eval=evaluations)
        if parts.trainer.card is not None:
            add_results(parts.trainer.card, self.folder)
        if any(evaluations.values()):
            self.screen.print(
                console.change_table(short_names(evaluations["before"]), short_names(evaluations["after"]))
            )
        exported: dict[str, Exported] = {}
        if parts.exporter is not None and status == "finished" and not self.run.dry_run:
            # The model is saved and the evaluation written: whatever happens to an export, the run is whole.
            exported = parts.exporter.run(
                self._whole_model(parts),
                parts.tokenizer,
                self.folder.path / EXPORT,
                parts.data.eval[:8]["prompt"],
                card=card_for_export(parts.trainer.card, self.folder) if parts.trainer.card else None,
                chat_template_kwargs=self.run.model.chat_template_kwargs,
                tell=lambda line: self.say([line]),
            )
            places |= {name: one.url or one.folder for name, one in exported.items() if one.error is None}
            note_exports(self.folder, exported)
        self.folder.finish(status, step=step, **self._recorder.totals())
        places |= {"status": status, "log": self.logger.location}
        if status == "interrupted":
            again = resume_command(self.run, self.folder.path)
            self.screen.print(f"interrupted at step {step}; continue with: {again}", markup=False)
        self.screen.print(console.where_table(places))
        for name, one in exported.items():
            if one.error is not None:
                again = export_command(self.run, self.folder.path, name)
                self.say([f"not exported: {one.error}", f"  again: {again}"])
        self._hand_over()

    def _whole_model(self, parts: Parts) -> Any:
        """The trained model; where the processes have shards of it, the one that was saved."""
        if not parts.trainer.sharded:
            return parts.trainer.model
        model, _ = load_policy(read_run(self.folder.path, force=True, trusted=self.run.model.trust_remote_code))
        return model

    def end_early(self, end: EarlyEnd) -> None:
        with self._at_end:
            # A new run that is refused before it has begun (no such model, a malformed file) leaves no folder.
            try:
                if end.refused and not self.begun:
                    self.folder.discard()
                else:
                    self.folder.finish(end.status, end.traceback, **self._recorder.totals())
                    self.screen.note(end.traceback or end.status)
            except (OSError, UserError) as error:
                # The reason of the early end follows, and is what matters.
                print(f"selfdistill: the end of the run could not be written down: {error}", file=sys.stderr)
            if self.begun:
                self._hand_over()
            self.logger.finish(failed=True)

    def close(self) -> None:
        with self._at_end:
            self.logger.finish()

    def _hand_over(self) -> None:
        """Gives the logger what is known of the run as a whole: its summary, and its report as files."""
        summary, evaluated = self.folder.summary, self.folder.summary.get("eval") or {}
        names = ("status", "step", "wall_s", "tokens_generated", "peak_memory_gib")
        known = {name: summary[name] for name in names if summary.get(name) is not None}
        sides = {side: short_names(evaluated[side]) for side in ("before", "after") if evaluated.get(side)}
        self._recorder.show(lambda: self.logger.summary({**known, **sides}))
        self._recorder.show(lambda: self.logger.files("report", self._there(*REPORT)))

    def _there(self, *names: str) -> list[Path]:
        return [path for name in names if (path := self.folder.path / name).is_file()]


def short_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of an evaluation without `eval/` before their names."""
    return {name.removeprefix("eval/"): value for name, value in metrics.items()}
