"""What a checkpoint needs beyond transformers' own, so that a resumed run ends with the numbers of an unbroken one."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import RepeatSampler

from selfdistill.errors import UserError

CHECKPOINTS = "checkpoints"  # in a run's folder
COMPLETE = "complete"  # written last into a checkpoint: one without it was cut off
TEACHER = "teacher.safetensors"


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    whole = [marker.parent for marker in (run / CHECKPOINTS).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


class CompleteCallback(TrainerCallback):
    """Marks a checkpoint as whole; stands behind every callback that adds to it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        PartialState().wait_for_everyone()  # every process adds its rollouts and its random state
        if args.should_save:
            (Path(args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / COMPLETE).touch()


class StepBegun(TrainerCallback):
    """Keeps the random state with which the current step began, and what was counted by then."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.random = random.getstate()
        self.numpy = numpy.random.get_state()
        self.torch, self.cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        self.micro_batches, self.tokens = self.trainer._step, state.num_input_tokens_seen

    def restore(self) -> None:
        """Puts all of it back, so that the step can begin again."""
        random.setstate(self.random)
        numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        torch.cuda.set_rng_state_all(self.cuda)
        self.trainer._step, self.trainer.state.num_input_tokens_seen = self.micro_batches, self.tokens


class ResumableSampler(RepeatSampler):
    """TRL's sampler, whose order in an epoch depends on seed and epoch alone.

    TRL's sampler draws each epoch's order from a generator that starts anew when a run is resumed, so that a run that
    is resumed in its second epoch would see the order of the first. An unbroken run has the same orders with either.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


def save(folder: Path, trainer: Any) -> None:
    """Adds to a checkpoint the teacher's weights, the count of micro-batches and the rollouts still needed."""
    accelerator = trainer.accelerator
    generate_every = trainer.args.steps_per_generation * trainer.num_iterations
    rollouts = trainer.unused_rollouts() if trainer._step % generate_every else None
    state = {"step": trainer._step, "rollouts": rollouts, "processes": accelerator.num_processes}
    torch.save(state, folder / _rollouts_file(accelerator.process_index))
    tensors = {} if trainer.teacher is None else trainer.teacher.state_dict()
    if tensors and (accelerator.is_main_process or trainer.sharded):
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / _teacher_file(trainer))


def restore(folder: Path, trainer: Any) -> None:
    """Puts what `save` wrote back into the trainer and its teacher.

    Raises:
        UserError: the checkpoint was written without this teacher, or by another number of processes.
    """
    accelerator = trainer.accelerator
    own = folder / _rollouts_file(accelerator.process_index)
    file = own if own.exists() else next(folder.glob(_rollouts_file("*")), None)
    # None in a checkpoint of another trainer
    state = file and torch.load(file, map_location=accelerator.device, weights_only=True)
    if state and state["processes"] != accelerator.num_processes:
        raise UserError(
            f"{folder} was written by {state['processes']} processes and there are {accelerator.num_processes} now: "
            f"start {state['processes']}, since a batch is divided among all of them."
        )
    if trainer.teacher is not None and trainer.teacher.state_dict():
        teacher = folder / _teacher_file(trainer)
        if not teacher.exists():
            raise UserError(
                f"{folder} has no {teacher.name}: it was written without this teacher and cannot be continued with it."
            )
        trainer.teacher.load_state_dict(load_file(teacher))
    if state:
        trainer._step, trainer._buffered_inputs = state["step"], state["rollouts"]


def _teacher_file(trainer: Any) -> str:
    """Of a sharded teacher each process keeps its shards."""
    return f"teacher-{trainer.accelerator.process_index}.safetensors" if trainer.sharded else TEACHER


def _rollouts_file(process: int | str) -> str:
    return f"rollouts-{process}.pt"
