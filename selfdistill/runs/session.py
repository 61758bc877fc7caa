"""One run from its folder's first line to its last: evaluated before and after, recorded, resumable, exported."""

import os
import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from omegaconf import DictConfig
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selfdistill import config
from selfdistill.config.batch import batch_of
from selfdistill.config.targets import make
from selfdistill.errors import UserError
from selfdistill.evaluation.evaluator import EvalCallback
from selfdistill.machine.memory_estimate import estimate
from selfdistill.rollout import Rollouts
from selfdistill.runs import console
from selfdistill.runs.callbacks import (
    CompletionsCallback,
    MonitorCallback,
    ProgressCallback,
    RecordCallback,
    use_callbacks,
)
from selfdistill.runs.folder import PromptSample, RunFolder
from selfdistill.runs.interruption import Interruption
from selfdistill.runs.loggers import NoLogger
from selfdistill.statistics import completion_metrics, reward_spread
from selfdistill.teachers.server.client import ServerUnavailable
from selfdistill.training import arguments, build

COMPLETE = "complete"  # written last into a checkpoint: without it a kill came in between
MODEL = "model"
PROMPT_SAMPLES = 4


class CompleteCallback(TrainerCallback):
    """Marks a checkpoint as whole; stands behind every callback that adds to it."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.should_save:
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / COMPLETE).touch()


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    whole = [marker.parent for marker in (run / build.CHECKPOINTS).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


class StepBegun(TrainerCallback):
    """Keeps the random state with which the current step began, and what was counted by then."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.state = random.getstate(), numpy.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()
        self.micro_batches, self.tokens = self.trainer._step, state.num_input_tokens_seen

    def restore(self) -> None:
        ours, numpys, torchs, cudas = self.state
        random.setstate(ours)
        numpy.random.set_state(numpys)
        torch.set_rng_state(torchs)
        torch.cuda.set_rng_state_all(cudas)
        self.trainer._step, self.trainer.state.num_input_tokens_seen = self.micro_batches, self.tokens


def resumed_config(cfg: DictConfig, overrides: list[str]) -> tuple[DictConfig, config.Run]:
    """The configuration of the run that `resume` names, and the run; of the command line only `max_steps` may differ.

    Raises:
        UserError: not a run's folder, a configuration that does not pass, or another key was given beside it.
    """
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if key not in ("resume", "max_steps"):
            raise UserError(
                f"{key} cannot be changed when a run is resumed: its configuration is in {cfg.resume}/config.yaml."
            )
    saved = RunFolder.open(Path(cfg.resume), write=False).config
    saved.resume = cfg.resume
    if any(o.startswith("max_steps=") for o in overrides):
        saved.max_steps = cfg.max_steps
    try:
        return saved, config.check(saved)
    except UserError as error:
        raise UserError(f"{cfg.resume}/config.yaml: {error}") from None


def show_plan(cfg: DictConfig, run: config.Run) -> None:
    """The composed tree and a memory estimate; nothing is loaded or written."""
    screen = console.make_console()
    console.print_all(screen, console.config_tree(cfg))
    screen.print("memory:", console.memory_line(estimate(run), run.hardware.memory_gib))
    screen.print("checked: nothing was loaded or written")


class Record:
    """What is written down of a run, and where."""

    def __init__(
        self, cfg: DictConfig, run: config.Run, folder: RunFolder, logger: Any, interruption: Interruption
    ) -> None:
        self.cfg, self.run, self.folder, self.logger, self.interruption = cfg, run, folder, logger, interruption
        self.screen = console.make_console()
        self.monitor: MonitorCallback | None = None
        self.final_accuracy: float | None = None
        self.before: dict[str, float] | None = None
        self._rows: list[dict] = []
        self._prompts_written = run.resume is not None
        self.places: dict[str, Any] = {"run": folder.path}
        self.begun = False

    # ---- before training ----

    def begin(self, parts: "build.Parts") -> None:
        """Shows the plan, evaluates the start, and puts the callbacks in place."""
        trainer = parts.trainer
        self.logger.start(self.folder, self.cfg)
        self.begun = True
        self.folder.write_bad_rows(parts.data.bad_rows)
        console.print_all(self.screen, console.config_tree(self.cfg), console.plan_table(self._plan(parts)))
        if parts.data.bad_rows:
            self.screen.print(
                f"{len(parts.data.bad_rows)} bad rows skipped, listed in {self.folder.path / 'bad_rows.jsonl'}"
            )
        if parts.evaluator is not None:
            stored = self.folder.summary.get("eval", {}).get("before") if self.run.resume else None
            self.before = stored or self._evaluate(parts, 0)
            self.folder.update_summary(eval={"before": self.before})
        record = RecordCallback(self.folder, self.logger)
        callbacks: list[TrainerCallback] = [record]
        if parts.monitors is not None:
            self.monitor = MonitorCallback(parts.monitors, self.folder, self.screen)
            callbacks.append(self.monitor)
        if parts.evaluator is not None and self.run.eval and (every := self.run.eval["every"]):
            callbacks.append(
                EvalCallback(parts.evaluator, parts.tokenizer, every=every, log=self._log_eval_of(trainer))
            )
        callbacks += [
            CompletionsCallback(record, self.screen, lambda: self._rows),
            ProgressCallback(self.screen),
            self.interruption,
        ]
        use_callbacks(trainer, callbacks)
        trainer.on_rollouts = lambda rollouts, _: self._keep(parts, rollouts)

    def _evaluate(self, parts: "build.Parts", step: int) -> dict[str, float]:
        with self.screen.status("evaluating") if self.screen.is_terminal else _nothing():
            evaluation = parts.evaluator.evaluate(parts.trainer.model, parts.tokenizer)
        return self._log_eval(step, evaluation.metrics())

    def _log_eval(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        before = self.before or metrics
        drops = [max(0.0, before[k] - v) for k, v in metrics.items() if k.startswith("eval/retention/") and k in before]
        if drops:
            metrics = {**metrics, "eval/forgetting": sum(drops) / len(drops)}
        self.folder.log_metrics(step, metrics)
        self.logger.log(step, metrics)
        return metrics

    def _log_eval_of(self, trainer: Any) -> Any:
        """During training the monitors hear of an evaluation too: by its accuracy the best checkpoint is chosen."""

        def log(step: int, metrics: dict[str, float]) -> None:
            metrics = self._log_eval(step, metrics)
            trainer.control = trainer.callback_handler.on_evaluate(
                trainer.args, trainer.state, trainer.control, metrics
            )

        return log

    def _plan(self, parts: "build.Parts") -> console.Plan:
        run, batch, model = self.run, batch_of(self.run), parts.trainer.model
        parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
        teacher = ""
        if parts.trainer.teacher is not None:
            teacher = str(parts.trainer.teacher)
        return console.Plan(
            model=run.model.name,
            device=f"{torch.cuda.get_device_name() if arguments.use_cuda(run.hardware) else 'cpu'}, {arguments.precision(run.hardware)}",
            parameters=sum(n for n, _ in parameters),
            trained=sum(n for n, trained in parameters if trained),
            train_rows=len(parts.data.train),
            eval_rows=len(parts.data.eval) if parts.data.eval is not None else 0,
            max_steps=parts.trainer.args.max_steps,
            completions_per_device=batch.per_device,
            accumulation=batch.accumulation_steps,
            processes=parts.trainer.accelerator.num_processes,
            num_generations=run.num_generations,
            adapter=f"LoRA, rank {run.model.lora.r}" if run.model.tuning == "lora" else "",
            teacher=teacher,
            memory_gib=estimate(run, trained=sum(n for n, trained in parameters if trained)),
        )

    # ---- during training ----

    def _keep(self, parts: "build.Parts", rollouts: Rollouts) -> None:
        columns = rollouts.prompts, rollouts.completions, rollouts.scores, rollouts.feedback, rollouts.advantages
        names = ("prompt", "completion", "reward", "feedback", "advantage")
        watched: dict[str, float | None] = dict(completion_metrics(rollouts.completion_ids))
        if parts.trainer.rewards:
            watched["monitor/reward_spread"] = reward_spread(rollouts.scores, rollouts.num_generations)
        for name, value in watched.items():
            if value is not None:
                parts.trainer.note(name, value)
        self._rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        if not self._prompts_written:
            self._prompts_written = True
            same = self.folder.write_prompts(prompt_samples(parts.tokenizer, rollouts))
            if not same:
                raise RuntimeError(f"student and teacher score different tokens: see {self.folder.path / 'prompts.md'}")

    # ---- after training ----

    def end(self, parts: "build.Parts") -> None:
        """Evaluates, saves the model, exports, and says where everything lies."""
        trainer, step = parts.trainer, parts.trainer.state.global_step
        status = "interrupted" if self.interruption.requested else "finished"
        if self.monitor is not None and self.monitor.stopped_by is not None:
            status = "stopped"
        trainer.save_model(str(self.folder.path / MODEL))
        parts.tokenizer.save_pretrained(self.folder.path / MODEL)
        self.places["model"] = self.folder.path / MODEL
        if parts.evaluator is not None and status != "interrupted":
            after = self._evaluate(parts, step)
            self.final_accuracy = after.get("eval/accuracy")
            self.folder.update_summary(eval={"before": self.before, "after": after})
            self.logger.summary(after)
            self.screen.print(console.change_table(_short(self.before), _short(after)))
        if parts.exporter is not None and status == "finished" and not self.run.dry_run:
            self.places["export"] = parts.exporter.run(
                trainer.model,
                parts.tokenizer,
                self.folder.path / "export" / parts.exporter.name,
                parts.data.eval[:8]["prompt"],
            )
        self.folder.finish(status, step=step)
        self.places["status"] = status
        self.places["log"] = self.logger.location
        if status == "interrupted":
            self.screen.print(
                f"interrupted at step {step}; continue with: python -m selfdistill.train resume={self.folder.path}"
            )
        self.screen.print(console.where_table(self.places))


def _short(metrics: Any) -> dict[str, float]:
    return {name.removeprefix("eval/"): value for name, value in dict(metrics).items()}


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def prompt_samples(tokenizer: Any, rollouts: Rollouts) -> list[PromptSample]:
    """The first prompts' rollouts as student and teacher see them, from the ids that go into the models.

    Where none of these has a teacher's signal, the first rollout that has one stands beside them.
    """
    chosen = list(range(0, len(rollouts), max(1, rollouts.num_generations))[:PROMPT_SAMPLES])
    taught = [i for i, sent in enumerate(rollouts.sent_to_teacher) if sent is not None]
    if taught and not set(taught) & set(chosen):
        chosen.append(taught[0])
    samples = []
    for i in chosen:
        sent = rollouts.sent_to_teacher[i] if i in taught else None
        samples.append(
            PromptSample(
                student=tokenizer.decode(rollouts.prompt_ids[i]),
                completion=tokenizer.decode(rollouts.completion_ids[i]),
                completion_ids=list(rollouts.completion_ids[i]),
                teacher=tokenizer.decode(sent[0]) if sent else None,
                teacher_completion_ids=sent[1] if sent else None,
            )
        )
    return samples


def train(parts: "build.Parts", record: Record) -> None:
    """Trains from the start, or from the newest whole checkpoint of a resumed run."""
    trainer = parts.trainer
    checkpoint = newest_checkpoint(record.folder.path) if record.run.resume else None
    begun = StepBegun(trainer)
    trainer.add_callback(begun)
    use_callbacks(trainer, [CompleteCallback()])  # stays the last one
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except ServerUnavailable:
        # No weight has changed since the step began: from where it began, it can begin again.
        begun.restore()
        if trainer.state.global_step:  # before that there is nothing to keep: resumed, the run starts with its seed
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        raise


@contextmanager
def recorded(cfg: DictConfig, run: config.Run, hydra_config: Any) -> Iterator[Record]:
    """The run's folder and logger, closed in every case: finished, stopped, interrupted or failed.

    A new run that is refused before it has begun (no such model, a malformed file) leaves no folder.
    """
    logger = make(run.logger, "logger") if _is_main() else None
    if run.resume:
        folder = RunFolder.open(Path(run.resume), write=_is_main())
    elif _is_main():
        folder = RunFolder.create(Path(run.output_dir), config.run_name(run, hydra_config.runtime.choices), cfg)
        _share(str(folder.path))
    else:
        folder = RunFolder.open(Path(_share(None)), write=False)
    record, failed = Record(cfg, run, folder, logger or NoLogger(), Interruption()), True
    with record.interruption:
        try:
            yield record
            failed = False
            if record.interruption.requested:
                raise SystemExit(record.interruption.exit_code)
        except KeyboardInterrupt:
            folder.finish("interrupted")
            raise SystemExit(record.interruption.exit_code) from None
        except UserError as error:
            if not record.begun and not run.resume:
                folder.discard()
                raise
            interrupted = isinstance(error, ServerUnavailable)
            folder.finish("interrupted" if interrupted else "failed", error=error)
            hint = f" Continue with: python -m selfdistill.train resume={folder.path}" if interrupted else ""
            raise UserError(f"{error}{hint}") from error
        except Exception as error:
            folder.finish("failed", error=error)
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"the run failed: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno}). "
                f"The traceback is in {folder.path / 'error.txt'}; continue from the last checkpoint with resume={folder.path}"
            ) from error
        finally:
            record.logger.finish(failed=failed)


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _share(path: str | None) -> str:
    """The main process's folder, known to all processes of the run."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return str(path)
    from accelerate.utils import broadcast_object_list

    holder = [path]
    broadcast_object_list(holder)
    return str(holder[0])
