"""Tasks that are trained one after the other: one folder, in it an ordinary run for each task.

Each stage starts from the weights that the one before ended with (its adapter, where there is one), so that these are
the reference of its KL penalty and what its teacher starts from. All tasks are evaluated before and after each.

The sequence's own folder is that of a run, and so sweeps, comparisons, resumptions and exports take it for one:
metrics.jsonl has a line for each stage, summary.json the measures of the whole, and model/ is the last stage's.
"""

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from selfdistill.config import Run
from selfdistill.config.permissions import resume_command
from selfdistill.config.targets import make
from selfdistill.errors import UserError
from selfdistill.evaluation.evaluator import PROBE, RETENTION, forgetting
from selfdistill.evaluation.transfer import AccuracyMatrix
from selfdistill.runs.folder import RunFolder, Status
from selfdistill.runs.loggers import NoLogger
from selfdistill.runs.placement import new_run
from selfdistill.runs.record import MODEL, short_names
from selfdistill.runs.screen import LOG, Screen
from selfdistill.runs.sequence_report import REPORT, matrix_table, write_report

if TYPE_CHECKING:
    from selfdistill.training.build import Parts

Metrics = dict[str, float]
OneRun = Callable[..., None]
DONE = ("finished", "stopped")


def train(
    cfg: DictConfig, run: Run, hydra_config: DictConfig, one_run: OneRun, begun: Callable[[RunFolder], None]
) -> None:
    """Trains the tasks of a sequence, or what is left of them.

    Args:
        one_run: trains a stage, as any run is trained; `ready` is given what it is made of before the training.
        begun: is given the sequence's folder.

    Raises:
        UserError: a stage was refused, or failed.
        SystemExit: it was interrupted.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "tasks: a sequence is for one process. With several start a run for each task, the later ones from the "
            "model of the one before: model.name=RUN/model."
        )
    folder = RunFolder.open(Path(run.resume)) if run.resume else new_run(cfg, run, hydra_config)
    sequence = Sequence(cfg, run, hydra_config, folder)
    begun(folder)
    try:
        for number in range(len(sequence.tasks)):
            if sequence.status(number) not in DONE:
                one_run(*sequence.stage(number), ready=partial(sequence.check_judged, number))
                gc.collect()  # a trainer and its callbacks refer to each other
            sequence.note(number)
            if sequence.status(number) == "stopped":
                break
        sequence.end("stopped" if sequence.status(number) == "stopped" else "finished")
    except BaseException as error:
        sequence.end_early(error)
        raise


def first_stage(cfg: DictConfig, run: Run) -> tuple[DictConfig, Run]:
    """The configuration of the first stage, for a plan; a run without tasks as it is."""
    return stage_config(cfg, run, 0, None) if run.tasks else (cfg, run)


def stage_config(cfg: DictConfig, run: Run, number: int, start: Path | None) -> tuple[DictConfig, Run]:
    """The configuration of one stage, as it is recorded and as it is checked.

    Args:
        start: the weights of the stage before; None for the first one.
    """
    names = list(run.tasks)
    task, others = names[number], [name for name in names if name != names[number]]
    stage = deepcopy(cfg)
    model, export = run.model, run.export if task == names[-1] else None
    if start is not None and model.tuning == "full":
        model = replace(model, name=str(start), revision=None)
    elif start is not None:
        model = replace(model, adapter_path=str(start))
    with open_dict(stage):
        stage.data = cfg.tasks[task]
        stage.probes = {**cfg.probes, **{name: cfg.tasks[name] for name in others}}
        stage.tasks, stage.resume, stage.repeat = {}, None, None
        stage.model.name, stage.model.revision, stage.model.adapter_path = (
            model.name,
            model.revision,
            model.adapter_path,
        )
        if export is None:
            stage.export = None
    probes = {**run.probes, **{name: run.tasks[name] for name in others}}
    changes: dict[str, Any] = {"data": run.tasks[task], "probes": probes, "model": model, "export": export}
    return stage, replace(run, **changes, tasks={}, resume=None, repeat=None)


class Sequence:
    """A sequence under way: where its stages lie, what they found, and what is written about the whole."""

    def __init__(self, cfg: DictConfig, run: Run, hydra_config: DictConfig, folder: RunFolder) -> None:
        self.cfg, self.run, self.hydra_config, self.folder = cfg, run, hydra_config, folder
        self.tasks = list(run.tasks)
        self.group = run.group or folder.run_id
        # A logger that knows groups shows the stages together.
        self.logger = run.logger
        if run.logger is not None and "group" in run.logger:
            self.logger = {**run.logger, "group": run.logger["group"] or self.group}
        self.screen = Screen()
        self.screen.keep(folder.path / LOG)

    def path(self, number: int) -> Path:
        """The folder of a stage. Its name is the run's id, which tells it apart wherever it is logged."""
        return self.folder.path / f"{self.folder.run_id}-{number + 1}-{self.tasks[number]}"

    def status(self, number: int) -> str | None:
        """None for a stage that did not begin."""
        with suppress(UserError):
            return str(RunFolder.open(self.path(number), write=False).summary["status"])
        return None

    def stage(self, number: int) -> tuple[DictConfig, Run, DictConfig]:
        """What a stage is trained with; one that began before goes on."""
        task, path = self.tasks[number], self.path(number)
        cfg, run = stage_config(self.cfg, self.run, number, self.path(number - 1) / MODEL if number else None)
        if self.status(number) is not None:
            run = replace(run, resume=str(path))
        run = replace(run, group=self.group, logger=self.logger)
        cfg.resume, cfg.group = run.resume, self.group
        # Without Hydra's types, which know no folder of a run.
        hydra_config = OmegaConf.create({"hydra": OmegaConf.to_container(self.hydra_config, resolve=False)}).hydra
        hydra_config.mode, hydra_config.run.folder = RunMode.RUN, str(path)
        if option := hydra_config.runtime.choices.get(f"data@tasks.{task}"):
            hydra_config.runtime.choices.data = option
        self.screen.print(f"\nstage {number + 1} of {len(self.tasks)}: {task}\n", markup=False)
        return cfg, run, hydra_config

    def _evaluated(self, number: int) -> tuple[dict[str, Metrics], dict[str, Any]]:
        """A stage's evaluations before and after, its accuracy by the name of its task, and its summary."""
        summary = RunFolder.open(self.path(number), write=False).summary
        found: dict[str, Metrics] = {}
        for side, metrics in summary["eval"].items():
            own = {f"{PROBE}{self.tasks[number]}": metrics["eval/accuracy"]}
            found[side] = {name: value for name, value in (metrics | own).items() if name != "eval/forgetting"}
        return found, summary

    def check_judged(self, number: int, parts: "Parts") -> None:
        """Whether every task will have an accuracy, before a stage is trained.

        Raises:
            UserError: one will not.
        """
        asked = {group.metric for group in parts.evaluator.groups} if parts.evaluator is not None else set()
        for place, task in enumerate(self.tasks):
            if ("eval/accuracy" if place == number else f"{PROBE}{task}") not in asked:
                raise UserError(
                    f"tasks.{task}: none of its evaluation rows can be judged, so it has no accuracy. Give them an "
                    "answer, or write reward@eval.scorer= with a reward that needs none."
                )

    def rows(self) -> Iterator[tuple[Metrics, dict[str, Any]]]:
        """Metrics at the start and after each stage that is done, with the stage's summary."""
        for number in range(len(self.tasks)):
            if self.status(number) not in DONE:
                return
            found, summary = self._evaluated(number)
            if number == 0:
                yield found["before"], {"step": 0, "tokens_generated": 0}
            yield found["after"], summary

    def matrix(self) -> AccuracyMatrix:
        """The accuracies so far."""
        found = [metrics for metrics, _ in self.rows()]
        return AccuracyMatrix(self.tasks, [{task: m[f"{PROBE}{task}"] for task in self.tasks} for m in found])

    def note(self, number: int) -> None:
        """Enters what is known after a stage: a line in metrics.jsonl, the report, the table on the screen."""
        matrix, known = self.matrix(), {line["step"] for line in self.folder.metrics()}
        step = tokens = 0
        start: Metrics = {}
        for place, (metrics, summary) in enumerate(self.rows()):
            start, step = start or metrics, step + summary["step"]
            tokens += summary.get("tokens_generated") or 0
            if step not in known:
                line = {**metrics, **_forgotten(start, metrics), "eval/accuracy": matrix.average_accuracy(place)}
                self.folder.log_metrics(step, {**line, "tokens/generated": tokens})
        self.folder.update_summary(step=step, tokens_generated=tokens)
        write_report(self.folder.path, matrix)
        self.screen.print(matrix_table(matrix))

    def end(self, status: Status) -> None:
        """Writes down what the whole sequence shows, and hands it to the logger."""
        matrix = self.matrix()
        (first, _), *_, (last, _) = self.rows()
        measures = matrix.measures() if matrix.is_complete else {"eval/accuracy": matrix.average_accuracy()}
        before = {**first, "eval/accuracy": matrix.average_accuracy(0)}
        after = {**last, **_forgotten(first, last), **measures}
        model = self.folder.path / MODEL
        model.unlink(missing_ok=True)
        model.symlink_to(Path(self.path(len(matrix.rows) - 2).name) / MODEL)
        self.folder.finish(status, eval={"before": before, "after": after})
        self.screen.print(f"{status}; everything lies in {self.folder.path}", markup=False, soft_wrap=True)
        self.screen.close()
        self._log(before, after)

    def _log(self, before: Metrics, after: Metrics) -> None:
        """The sequence as a run of its own, beside those of its stages, once these are over."""
        logger = make(self.logger, "logger") or NoLogger()
        try:
            logger.start(self.folder, self.cfg)
            logger.catch_up(self.folder.metrics(), [])
            short = {side: short_names(metrics) for side, metrics in (("before", before), ("after", after))}
            logger.summary({"status": self.folder.summary["status"], "step": self.folder.summary["step"], **short})
            there = (self.folder.path / name for name in ("summary.json", "metrics.jsonl", *REPORT))
            logger.files("report", [path for path in there if path.is_file()])
        finally:
            logger.finish()

    def end_early(self, error: BaseException) -> None:
        """Closes a sequence one of whose stages failed or was interrupted; one that never began leaves nothing."""
        began = [number for number in range(len(self.tasks)) if self.status(number) is not None]
        interrupted = not isinstance(error, Exception) or (began and self.status(began[-1]) == "interrupted")
        with suppress(OSError, UserError):  # the error under way says more
            if began or self.run.resume:
                written = None if interrupted else "".join(traceback.format_exception(error))
                self.folder.finish("interrupted" if interrupted else "failed", written)
                again = resume_command(self.run, self.folder.path)
                self.screen.print(f"the sequence goes on with: {again}", markup=False, soft_wrap=True)
        self.screen.close()
        if not began and not self.run.resume:
            self.folder.discard()


def _forgotten(start: Metrics, metrics: Metrics) -> Metrics:
    """What of the old skills is lost since the start of the sequence."""
    lost = forgetting(start, metrics) if any(name.startswith(RETENTION) for name in start) else None
    return {} if lost is None else {"eval/forgetting": lost}
