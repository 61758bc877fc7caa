"""One run from its folder's first line to its last, in one process or in several: each goes through all of this.

What the main process alone does is in `record`; how the end of one process ends the others is in `processes`.
"""

import traceback
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from selfdistill import config
from selfdistill.config.messages import fail
from selfdistill.config.overrides import key_of
from selfdistill.config.permissions import granted_again, resume_command
from selfdistill.config.secrets import without_secrets
from selfdistill.config.targets import make
from selfdistill.errors import UserError
from selfdistill.files import disk_space, draft_of
from selfdistill.rollout import Rollouts
from selfdistill.runs.best import KeepBest, load_best
from selfdistill.runs.budget import Budget
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
from selfdistill.training.checkpoints import CompleteCallback, StepBegun, damage, marked_checkpoints, step_of, unmark
from selfdistill.training.trainer import SelfDistillTrainer

# What a resumed run may be given anew: how long it is to train.
LENGTH = ("max_steps", "epochs", "budget_s", "budget_tokens")


def resumed_config(cfg: DictConfig, overrides: list[str]) -> tuple[DictConfig, config.Run]:
    """The configuration of the run that `resume` names, and the run; of the command line only its length may differ.

    What runs code of others, and secrets, which are not recorded, are given again (`config.permissions`).

    Raises:
        UserError: not a run's folder, a configuration that does not pass, another key was given beside it, or the run
            has done already what it is to do.
    """
    folder = RunFolder.open(Path(cfg.resume), write=False)
    saved = folder.config
    again = granted_again(saved, cfg, overrides, f"resume={cfg.resume}")
    started_with = folder.overrides
    for override, mask in zip(overrides, without_secrets(overrides), strict=True):
        key = key_of(override)
        if key not in ("resume", "check", *LENGTH, *again) and mask not in started_with:
            raise UserError(
                f"{key} cannot be changed when a run is resumed: its configuration is in {cfg.resume}/config.yaml."
            )
    saved.resume, saved.check = cfg.resume, cfg.check
    before = {key: saved.get(key) for key in LENGTH}
    longer = {key_of(override) for override in overrides}.intersection(LENGTH)
    if "max_steps" in longer:
        saved.max_steps, saved.epochs = cfg.max_steps, None
    for key in set(LENGTH) - {"max_steps"}:
        if key in longer:
            saved[key] = cfg[key]
    try:
        checked = config.check(saved)
    except UserError as error:
        raise UserError(f"{cfg.resume}/config.yaml: {error}") from None
    _check_unfinished(folder, checked, longer, before)
    return saved, checked


def _check_unfinished(folder: RunFolder, run: config.Run, longer: Set[str], before: Mapping[str, Any]) -> None:
    """A finished run is not trained any further, unless more is asked for than it had `before`."""
    status, step = folder.summary.get("status"), folder.summary.get("step") or 0
    if run.tasks and longer:
        raise UserError(f"{min(longer)} cannot be changed when a sequence of tasks goes on: it is that of every stage.")
    if run.tasks and status == "finished":
        raise UserError(
            f"{folder.path} is finished: all of its tasks are trained. Start a new run from its model: "
            f"model.name={folder.path / MODEL}"
        )
    checkpoints = marked_checkpoints(folder.path)
    reached = max([step_of(path) for path in checkpoints[:1]], default=step if status == "finished" else 0)
    if "max_steps" in longer and run.max_steps is not None and run.max_steps < reached:
        raise UserError(f"max_steps={run.max_steps}: {folder.path} has trained {reached} steps already; ask for more.")
    if status == "stopped":
        raise UserError(
            f"{folder.path} was stopped by a monitor at step {step}, and would be again. "
            "Start a new run with other monitors, for example monitors=default."
        )
    if status == "finished" and not any(_is_more(key, run, before, reached) for key in longer):
        unread = "max_steps" if before["epochs"] is not None else None
        twice = [f"{key}={2 * limit}" for key, limit in before.items() if limit is not None and key != unread]
        raise UserError(
            f"{folder.path} is finished: all of its {step} steps are trained. To train more, ask for more in all: "
            f"resume={folder.path} {' '.join(twice)}"
        )
    if status == "finished" and not checkpoints:
        raise UserError(
            f"{folder.path} is finished and kept no checkpoint to go on from (training.checkpoint_every=0). Start a "
            f"new run from its model: model.name={folder.path / MODEL}"
        )


def _is_more(key: str, run: config.Run, before: Mapping[str, Any], reached: int) -> bool:
    """Whether a finished run could train more with this key of LENGTH, which is given anew, than it did `before`."""
    now, had = getattr(run, key), before[key]
    if key == "max_steps":
        had = max(reached, had or 0) if before["epochs"] is None else reached
    if now is None or had is None:  # a budget that there was not before only takes away; epochs replace max_steps
        return now is None or key == "epochs"
    return bool(now > had)


def whole_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and what to say: of the damaged ones that are newer, or that there is none.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in marked_checkpoints(run):
        wrong = damage(checkpoint)
        if wrong is None:
            notes = [f"{path.name} is damaged: {why}" for path, why in damaged.items()]
            for path in damaged:
                unmark(path)
            goes_on = f"the run goes on from {checkpoint.name}, the newest whole checkpoint"
            return checkpoint, [*notes, goes_on] if notes else []
        damaged[checkpoint] = wrong
    if damaged:
        why = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
        raise UserError(
            f"{run} cannot be continued: none of its checkpoints is whole ({why}). Put the files back, or start a new "
            "run."
        )
    return None, ["the run has no checkpoint yet: it starts again at step 0"]


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
        self._budget = Budget(run.budget_s, run.budget_tokens, lambda: self._tokens.count)

    def begin(self, parts: Parts) -> None:
        """Shows the plan, evaluates the start, and puts the callbacks in place."""
        trainer = parts.trainer
        self.record.begin(parts)
        recording = self.record.callbacks(
            parts, self._tokens, self._budget, interrupted=lambda: self.interruption.requested
        )
        callbacks = [self._tokens, self._budget, *recording]
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
        checkpoint = self._checkpoint()
        begun = StepBegun(trainer)
        # The latter stays the last one.
        use_callbacks(trainer, [begun, CompleteCallback(self.run.training.keep_checkpoints)])
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Exception:
            # Where no weight has changed since the step began, a checkpoint of that moment lets a resumed run repeat
            # the step. Before the first step there is nothing to save, since a resumed run starts with its seed again.
            # Of several processes one may have failed while the others have not, and a checkpoint takes all.
            if begun.intact and trainer.state.global_step and self.processes.count == 1:
                begun.restore()
                self._tokens.restore()
                self._save_where_there_is_none(trainer)
            raise

    def _checkpoint(self) -> Path | None:
        """Where a resumed run goes on: the main process decides, and says what is amiss."""
        found: tuple[Path | None, list[str]] = None, []
        if self.run.resume and self.processes.is_main:
            found = whole_checkpoint(self.folder.path)
        checkpoint, notes = self.processes.share(found)
        self.record.say(notes)
        return checkpoint

    def _save_where_there_is_none(self, trainer: SelfDistillTrainer) -> None:
        step = trainer.state.global_step
        if all(step_of(path) != step for path in marked_checkpoints(self.folder.path)):
            with suppress(UserError):  # the error under way says more than that this could not be written either
                trainer.save_checkpoint()

    def end(self, parts: Parts) -> None:
        """Saves the model, evaluates and exports it."""
        trainer, interrupted = parts.trainer, self.interruption.requested
        self.folder.check()
        best = None
        if self.run.keep_best is not None and not interrupted:
            best, damaged = load_best(trainer, self.folder.path, self.processes)
            self.record.kept(self.run.keep_best, best, trainer.state.best_metric, damaged)
        draft = self.processes.share(draft_of(self.folder.path / MODEL))
        trainer.save_model(str(draft))
        self.record.save_model(parts, draft)
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
        cpu=not use_cuda(run.hardware),
        backend=arguments.get("ddp_backend"),
        timeout_s=arguments.get("ddp_timeout", 1800),
    )
    record: NoRecord | None = None
    with Interruption(notice=processes.is_main) as interruption, processes:
        try:
            record = _open_record(cfg, run, hydra_config, processes)
            processes.on_early_end = partial(_end_early, record, interruption)
            session = Session(run, record, processes, interruption)
            with session.at_end:
                yield session
        except BaseException as error:
            end = processes.announce(_reason(error, processes, interruption))
            if record is not None:
                _end_early(record, interruption, end)
            processes.acknowledge(end)
            if end.process != processes.index:  # the other process says why
                raise SystemExit(end.exit_code) from None
            message = _message(error, record, end, run) or error
            if isinstance(message, UserError) and not processes.is_main:
                raise SystemExit(fail(str(message), alone=True)) from error
            if message is not error:
                raise message from error
            raise
        record.close()
        processes.wait_for_all()  # a launcher ends all as soon as one is gone with an exit code
        record.folder.check()
        if interruption.requested:
            raise SystemExit(interruption.exit_code)


def _open_record(cfg: DictConfig, run: config.Run, hydra_config: DictConfig, processes: Processes) -> NoRecord:
    if not processes.is_main:
        folder = RunFolder.open(Path(processes.share("")), write=False)
        return NoRecord(folder, resumed=run.resume is not None)
    logger = make(run.logger, "logger") or NoLogger()
    if run.resume:
        folder = RunFolder.open(Path(run.resume))
        folder.change_config({key: cfg[key] for key in LENGTH if key in cfg})
    else:
        folder = new_run(cfg, run, hydra_config)
    processes.share(str(folder.path))
    return Record(cfg, run, folder, logger)


def _end_early(record: NoRecord, interruption: Interruption, end: EarlyEnd) -> None:
    interruption.notice = False  # a launcher signals the processes that are about to end by themselves
    record.end_early(end)


def _reason(error: BaseException, processes: Processes, interruption: Interruption) -> EarlyEnd:
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
    if not isinstance(error, Exception):
        return None
    if record is None or not record.begun or not record.folder.is_there:
        return _disk_message(error, record)
    path = record.folder.path
    if isinstance(error, UserError):
        return UserError(f"{error}\n{_how_to_go_on(run, path)}")
    last = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):
        what += disk_space(path)
    written = f" The traceback is in {path / 'error.txt'}." if (path / "error.txt").exists() else ""
    return UserError(
        f"the run failed: {what} ({Path(last.filename).name}:{last.lineno}).{written} {_how_to_go_on(run, path)}"
    )


def _how_to_go_on(run: config.Run, path: Path) -> str:
    checkpoints = marked_checkpoints(path)
    where = f"after step {step_of(checkpoints[0])}" if checkpoints else "at step 0, since there is no checkpoint yet"
    return f"To go on {where}: {resume_command(run, path)}"


def _disk_message(error: Exception, record: NoRecord | None) -> UserError | None:
    """A disk that could not be written to before the run began, or a folder that is gone: no fault of the program."""
    if record is not None and record.begun and not record.folder.is_there:  # safetensors has an error of its own for it
        return UserError(f"the run could not be written: {error} ({record.folder.path} is gone).")
    if not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError):
        return None
    where = f"{error.filename}: " if error.filename else ""
    return UserError(f"the run could not be written: {where}{error.strerror or error}.")
