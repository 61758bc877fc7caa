"""One run from its folder's first line to its last, in one process or in several: each goes through all of this.

What the main process alone does is in `record`; how the end of one process ends the others is in `processes`.
"""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from selfdistill import config
from selfdistill.config.permissions import granted_again, resume_command
from selfdistill.config.targets import make
from selfdistill.errors import UserError
from selfdistill.rollout import Rollouts
from selfdistill.runs.best import KeepBest, load_best
from selfdistill.runs.callbacks import GeneratedTokens, MainDecides, use_callbacks
from selfdistill.runs.evaluations import Evaluations
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.interruption import Interruption
from selfdistill.runs.loggers import NoLogger
from selfdistill.runs.placement import new_run
from selfdistill.runs.processes import EarlyEnd, Processes
from selfdistill.runs.record import MODEL, NoRecord, Record
from selfdistill.runs.samples import rollout_metrics
from selfdistill.teachers.server.client import ServerUnavailable
from selfdistill.training.arguments import use_cuda
from selfdistill.training.build import Parts
from selfdistill.training.checkpoints import CompleteCallback, StepBegun, newest_checkpoint


def resumed_config(cfg: DictConfig, overrides: list[str]) -> tuple[DictConfig, config.Run]:
    """The configuration of the run that `resume` names, and the run; of the command line only its length may differ.

    What runs code of others, and secrets, which are not recorded, are given again (`config.permissions`).

    Raises:
        UserError: not a run's folder, a configuration that does not pass, or another key was given beside it.
    """
    saved = RunFolder.open(Path(cfg.resume), write=False).config
    again = granted_again(saved, cfg, overrides, f"resume={cfg.resume}")
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if key not in ("resume", "max_steps", "epochs", "check", *again):
            raise UserError(
                f"{key} cannot be changed when a run is resumed: its configuration is in {cfg.resume}/config.yaml."
            )
    saved.resume, saved.check = cfg.resume, cfg.check
    if any(o.startswith("max_steps=") for o in overrides):
        saved.max_steps, saved.epochs = cfg.max_steps, None
    if any(o.startswith("epochs=") for o in overrides):
        saved.epochs = cfg.epochs
    try:
        return saved, config.check(saved)
    except UserError as error:
        raise UserError(f"{cfg.resume}/config.yaml: {error}") from None


class Session:
    """A run that is under way: what every process of it does, in the same order.

    Attributes:
        folder: the run's folder.
        at_end: what is closed when the run is over, however it ends.
    """

    def __init__(self, run: config.Run, record: NoRecord, processes: Processes, interruption: Interruption) -> None:
        self.run, self.record, self.processes, self.interruption = run, record, processes, interruption
        self.folder = record.folder
        self.at_end = ExitStack()
        self._evaluations: Evaluations | None = None
        self._tokens = GeneratedTokens()

    def begin(self, parts: Parts) -> None:
        """Shows the plan, evaluates the start, and puts the callbacks in place."""
        trainer = parts.trainer
        if trainer.teacher is not None:
            self.at_end.callback(trainer.teacher.close)
        self.record.begin(parts)
        callbacks = [self._tokens, *self.record.callbacks(parts, self._tokens)]
        if parts.evaluator is not None and self.run.eval is not None:
            self._evaluations = Evaluations(
                parts.evaluator,
                parts.tokenizer,
                self.record,
                every=self.run.eval["every"],
                before=self.folder.summary.get("eval", {}).get("before") if self.run.resume else None,
                tell=trainer.report_evaluation,
            )
            if self._evaluations.before is None and not trainer.sharded:
                self._evaluations.at(0, trainer.model)
            callbacks.append(self._evaluations)
        if self.run.keep_best is not None and self.processes.is_main:
            callbacks.append(KeepBest(self.run.keep_best, self.folder))
        callbacks.append(self.interruption)
        if self.processes.count > 1:
            callbacks.append(MainDecides())
        use_callbacks(trainer, callbacks)
        trainer.on_rollouts = partial(self._look_at_rollouts, parts)

    def _look_at_rollouts(self, parts: Parts, rollouts: Rollouts, _: Mapping[str, Any]) -> None:
        for name, value in rollout_metrics(rollouts, rewarded=bool(parts.trainer.rewards)).items():
            parts.trainer.note(name, value)
        self._tokens.add(rollouts)
        self.record.rollouts(parts, rollouts)

    def train(self, parts: Parts) -> None:
        """Trains from the start, or from the newest whole checkpoint of a resumed run."""
        trainer = parts.trainer
        checkpoint = newest_checkpoint(self.folder.path) if self.run.resume else None
        begun = StepBegun(trainer)
        use_callbacks(trainer, [begun, CompleteCallback()])  # the latter stays the last one
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except ServerUnavailable:
            # No weight has changed since the step began: a checkpoint of that moment lets a resumed run repeat the
            # step. Before the first step there is nothing to save, since a resumed run starts with its seed again. Of
            # several processes one may have lost the server while the others have not, and a checkpoint takes all.
            begun.restore()
            self._tokens.restore()
            if trainer.state.global_step and self.processes.count == 1:
                trainer.save_checkpoint()
            raise

    def end(self, parts: Parts) -> None:
        """Saves the model, evaluates and exports it."""
        trainer, interrupted = parts.trainer, self.interruption.requested
        best = None
        if self.run.keep_best is not None and not interrupted:
            best = load_best(trainer, self.folder.path)
            self.record.kept(self.run.keep_best, best, trainer.state.best_metric)
        trainer.save_model(str(self.folder.path / MODEL))
        evaluations: dict[str, dict[str, float]] = {}
        if self._evaluations is not None and not interrupted:
            is_last = best in (None, trainer.state.global_step)
            after = (
                self._evaluations.at(trainer.state.global_step, trainer.model)
                if is_last
                else self._evaluations.again(trainer.model)
            )
            evaluations = {"before": self._evaluations.before or after, "after": after}
        self.record.end(parts, evaluations, interrupted=interrupted)


@contextmanager
def recorded(cfg: DictConfig, run: config.Run, hydra_config: DictConfig) -> Iterator[Session]:
    """The run's processes, folder and logger, closed in every case: finished, stopped, interrupted or failed.

    Raises:
        UserError: the run failed, or was refused.
        SystemExit: it was interrupted, or another process ended it.
    """
    arguments = run.training.arguments
    processes = Processes(
        cpu=arguments.get("use_cpu", not use_cuda(run.hardware)),
        backend=arguments.get("ddp_backend"),
        timeout_s=arguments.get("ddp_timeout", 1800),
    )
    record: NoRecord | None = None
    with Interruption(notice=processes.is_main) as interruption, processes:
        try:
            record = _open_record(cfg, run, hydra_config, processes)
            processes.on_early_end = record.end_early
            session = Session(run, record, processes, interruption)
            with session.at_end:
                yield session
        except BaseException as error:
            end = processes.announce(_early_end(error, processes, interruption))
            if record is not None:
                record.end_early(end)
            processes.acknowledge(end)
            if end.process != processes.index:  # the other process says why
                raise SystemExit(end.exit_code) from None
            if (message := _message(error, record, end, run)) is not None:
                raise message from error
            raise
        record.close()
        processes.wait_for_all()  # a launcher ends all as soon as one is gone with an exit code
        if interruption.requested:
            raise SystemExit(interruption.exit_code)


def _open_record(cfg: DictConfig, run: config.Run, hydra_config: DictConfig, processes: Processes) -> NoRecord:
    if not processes.is_main:
        return NoRecord(RunFolder.open(Path(processes.share("")), write=False))
    logger = make(run.logger, "logger") or NoLogger()
    folder = RunFolder.open(Path(run.resume)) if run.resume else new_run(cfg, run, hydra_config)
    processes.share(str(folder.path))
    return Record(cfg, run, folder, logger)


def _early_end(error: BaseException, processes: Processes, interruption: Interruption) -> EarlyEnd:
    if not isinstance(error, Exception):
        return EarlyEnd("interrupted", interruption.exit_code, process=processes.index)
    return EarlyEnd(
        "interrupted" if isinstance(error, ServerUnavailable) else "failed",
        exit_code=2,
        refused=isinstance(error, UserError),
        traceback="".join(traceback.format_exception(error)),
        process=processes.index,
    )


def _message(error: BaseException, record: NoRecord | None, end: EarlyEnd, run: config.Run) -> BaseException | None:
    """How the command ends: with the exit code of an interrupted one, or with a message that says how to go on.

    None where the error itself says all there is to say.
    """
    if isinstance(error, KeyboardInterrupt):
        return SystemExit(end.exit_code)
    if not isinstance(error, Exception) or record is None or not record.folder.path.exists():
        return None
    if isinstance(error, ServerUnavailable):
        return UserError(f"{error} Continue with: {resume_command(run, record.folder.path)}")
    if isinstance(error, UserError):
        return None
    last = traceback.extract_tb(error.__traceback__)[-1]
    return UserError(
        f"the run failed: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno}). The traceback is "
        f"in {record.folder.path / 'error.txt'}; continue from the last checkpoint with: "
        f"{resume_command(run, record.folder.path)}"
    )
