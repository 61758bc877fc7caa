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

from selfdistill.errors import UserError
from selfdistill.evaluation.evaluator import EvalCallback
from selfdistill.evaluation.monitors import completion_metrics, reward_spread
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
from selfdistill.runs.placement import new_run
from selfdistill.teachers.server.client import ServerUnavailable
from selfdistill.training import build

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


def resumed_config(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of the run that `resume` names; of the command line only `max_steps` may differ.

    Raises:
        UserError: not a run's folder, or another key was given beside it.
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
    return saved


def show_plan(cfg: DictConfig) -> None:
    """The composed tree and a memory estimate; nothing is loaded or written."""
    screen = console.make_console()
    console.print_all(screen, console.config_tree(cfg))
    screen.print(
        "memory:", console.memory_line(estimate(cfg), cfg.hardware.memory_gib and float(cfg.hardware.memory_gib))
    )
    screen.print("checked: nothing was loaded or written")


class Record:
    """What is written down of a run, and where."""

    def __init__(self, cfg: DictConfig, folder: RunFolder, logger: Any, interruption: Interruption) -> None:
        self.cfg, self.folder, self.logger, self.interruption = cfg, folder, logger, interruption
        self.screen = console.make_console()
        self.monitor: MonitorCallback | None = None
        self.final_accuracy: float | None = None
        self.before: dict[str, float] | None = None
        self._rows: list[dict] = []
        self._prompts_written = cfg.resume is not None
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
            stored = self.folder.summary.get("eval", {}).get("before") if self.cfg.resume else None
            self.before = stored or self._evaluate(parts, 0)
            self.folder.update_summary(eval={"before": self.before})
        record = RecordCallback(self.folder, self.logger)
        callbacks: list[TrainerCallback] = [record]
        if parts.monitors is not None:
            self.monitor = MonitorCallback(parts.monitors, self.folder, self.screen)
            callbacks.append(self.monitor)
        if parts.evaluator is not None and self.cfg.eval.every:
            callbacks.append(
                EvalCallback(
                    parts.evaluator, parts.tokenizer, every=self.cfg.eval.every, log=self._log_eval_of(trainer)
                )
            )
        callbacks += [
            CompletionsCallback(record, self.screen, lambda: self._rows),
            ProgressCallback(self.screen),
            self.interruption,
        ]
        use_callbacks(trainer, callbacks)
        trainer.on_rollouts = lambda *seen: self._keep(parts, *seen)

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
        cfg, model = self.cfg, parts.trainer.model
        parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
        teacher = ""
        if parts.trainer.teacher is not None:
            who = parts.trainer.teacher
            inside = getattr(who, "weights", who)
            teacher = f"{type(inside).__name__}, sees {type(who.context).__name__}"
        return console.Plan(
            model=str(cfg.model.name),
            device=f"{torch.cuda.get_device_name() if build.use_cuda(cfg) else 'cpu'}, {build.precision(cfg)}",
            parameters=sum(n for n, _ in parameters),
            trained=sum(n for n, trained in parameters if trained),
            train_rows=len(parts.data.train),
            eval_rows=len(parts.data.eval) if parts.data.eval is not None else 0,
            max_steps=parts.trainer.args.max_steps,
            completions_per_device=cfg.hardware.per_device_batch_size,
            accumulation=cfg.hardware.accumulation_steps,
            processes=parts.trainer.accelerator.num_processes,
            num_generations=cfg.num_generations,
            adapter=f"LoRA, rank {cfg.model.lora.r}" if cfg.model.tuning == "lora" else "",
            teacher=teacher,
            memory_gib=estimate(cfg, trained=sum(n for n, trained in parameters if trained)),
        )

    # ---- during training ----

    def _keep(self, parts: "build.Parts", rollouts: Rollouts, teacher_prompts: list | None, tensors: dict) -> None:
        advantages = tensors["advantages"]
        if advantages.dim() > 1:  # one for each token
            mask = tensors["completion_mask"]
            advantages = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        columns = rollouts.prompts, rollouts.completions, rollouts.scores, rollouts.feedback, advantages.tolist()
        names = ("prompt", "completion", "reward", "feedback", "advantage")
        watched: dict[str, float | None] = dict(completion_metrics(rollouts.completion_ids))
        if parts.trainer.rewards:
            watched["monitor/reward_spread"] = reward_spread(rollouts.scores, rollouts.num_generations)
        for name, value in watched.items():
            if value is not None:
                parts.trainer._metrics["train"][name].append(value)
        self._rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        if not self._prompts_written:
            self._prompts_written = True
            same = self.folder.write_prompts(prompt_samples(parts.tokenizer, rollouts, teacher_prompts, tensors))
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
        if parts.exporter is not None and status == "finished" and not self.cfg.dry_run:
            self.places["export"] = parts.exporter.run(
                trainer.model,
                parts.tokenizer,
                self.folder.path / "export" / export_name(self.cfg),
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


def export_name(cfg: DictConfig) -> str:
    """The folder's name of an export, from its class: Merged16bit -> merged_16bit."""
    return {"Lora": "lora", "Merged16bit": "merged_16bit"}.get(cfg.export._target_.rsplit(".", 1)[1], "export")


def _short(metrics: Any) -> dict[str, float]:
    return {name.removeprefix("eval/"): value for name, value in dict(metrics).items()}


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def prompt_samples(
    tokenizer: Any, rollouts: Rollouts, teacher_prompts: list | None, tensors: dict[str, torch.Tensor]
) -> list[PromptSample]:
    """The first prompts' rollouts as student and teacher see them, from the ids that go into the models.

    Where none of these has a teacher's signal, the first rollout that has one stands beside them.
    """
    shown = list(range(0, len(rollouts), max(1, rollouts.num_generations))[:PROMPT_SAMPLES])
    taught = [i for i, prompt in enumerate(teacher_prompts or []) if prompt is not None]
    if taught and not set(taught) & set(shown):
        shown.append(taught[0])
    samples = []
    for i in shown:
        student = tensors["prompt_ids"][i][tensors["prompt_mask"][i].bool()].tolist()
        scored = tensors["completion_ids"][i][tensors["completion_mask"][i].bool()].tolist()
        theirs, their_ids = None, None
        if i in taught:
            mask = tensors["teacher_prompt_mask"][i].bool()
            theirs = tokenizer.decode(tensors["teacher_prompt_ids"][i][mask])
            # A completion that is masked as a whole is not scored.
            their_ids = scored or None
        samples.append(
            PromptSample(
                student=tokenizer.decode(student),
                completion=tokenizer.decode(rollouts.completion_ids[i]),
                completion_ids=list(rollouts.completion_ids[i]),
                teacher=theirs,
                teacher_completion_ids=their_ids,
            )
        )
    return samples


def train(parts: "build.Parts", record: Record) -> None:
    """Trains from the start, or from the newest whole checkpoint of a resumed run."""
    trainer = parts.trainer
    checkpoint = newest_checkpoint(record.folder.path) if record.cfg.resume else None
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
def recorded(cfg: DictConfig, hydra_config: Any) -> Iterator[Record]:
    """The run's folder and logger, closed in every case: finished, stopped, interrupted or failed.

    A new run that is refused before it has begun (no such model, a malformed file) leaves no folder.
    """
    logger = build.make(cfg, "logger") if _is_main() else None
    if cfg.resume:
        folder = RunFolder.open(Path(cfg.resume), write=_is_main())
    elif _is_main():
        folder = new_run(cfg, hydra_config)
        _share(str(folder.path))
    else:
        folder = RunFolder.open(Path(_share(None)), write=False)
    record, failed = Record(cfg, folder, logger or NoLogger(), Interruption()), True
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
            if not record.begun and not cfg.resume:
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
