"""What a checkpoint needs beyond transformers' own, so that a resumed run ends with the numbers of an unbroken one.

A checkpoint is whole when its marker, which is written last, lists its files and all of them have the content that
they had then. The marker goes first when a checkpoint is deleted. Nothing is deleted before a newer one is whole.
"""

import json
import random
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl.trainer.utils import RepeatSampler

from selfdistill.errors import UserError
from selfdistill.files import write_atomically

CHECKPOINTS = "checkpoints"  # in a run's folder
COMPLETE = "complete"  # written last into a checkpoint: its other files, their sizes and checksums
DAMAGED = "damaged"  # what the marker of a damaged checkpoint is called
TEACHER = "teacher.safetensors"
# For people: changing it changes nothing of what a resumed run does.
CARD = "README.md"
# Found at 1.2 GB/s, twice as fast as SHA-256: what is looked for is damage, not forgery.
BLOCK_BYTES = 1 << 22


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def marked_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that were whole when they were saved, the newest first."""
    return _marked(run / CHECKPOINTS)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; None where there is none."""
    return next((path for path in marked_checkpoints(run) if damage(path) is None), None)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a marked checkpoint: the first file that is not what was saved; None where all are."""
    try:
        saved = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["files"]
        sizes = {name: int(entry["bytes"]) for name, entry in saved.items()}
        checksums = {name: int(entry["crc32"]) for name, entry in saved.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{COMPLETE} cannot be read"
    for name in sorted(saved, key=lambda name: sizes[name]):
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != sizes[name]:
            return f"{name} has {file.stat().st_size:,} bytes instead of {sizes[name]:,}"
        try:
            if _crc32(file) != checksums[name]:
                return f"{name} is not as it was saved"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def mark(checkpoint: Path) -> None:
    """Declares a checkpoint whole: all of its files are there."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name not in (COMPLETE, CARD))
    listed = {str(f.relative_to(checkpoint)): {"bytes": f.stat().st_size, "crc32": _crc32(f)} for f in files}
    write_atomically(checkpoint / COMPLETE, json.dumps({"files": listed}, indent=1) + "\n")


def unmark(checkpoint: Path) -> None:
    """Declares a checkpoint damaged. It stays until a newer one is whole, for someone who wants to look at it."""
    (checkpoint / COMPLETE).rename(checkpoint / DAMAGED)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, its marker first, so that what a kill leaves of it is never taken for a whole one."""
    with suppress(FileNotFoundError):
        (checkpoint / COMPLETE).unlink()
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(folder: Path, keep: int, best_step: int | None) -> None:
    """Deletes what is no whole checkpoint, and of the whole ones all but the newest and the best.

    Args:
        folder: that of the checkpoints.
        keep: how many of the newest stay.
        best_step: the step of a checkpoint that stays beside them.
    """
    marked = _marked(folder)
    kept = {*marked[:keep], *(path for path in marked if step_of(path) == best_step)}
    if marked:
        for path in _all(folder):
            if path not in kept:
                remove(path)


def _all(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def _marked(folder: Path) -> list[Path]:
    return [path for path in _all(folder) if (path / COMPLETE).is_file()]


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


class CompleteCallback(TrainerCallback):
    """Marks a checkpoint as whole, and deletes old ones; stands behind every callback that adds to a checkpoint.

    Args:
        keep: how many checkpoints stay, beside the best one where a monitor or a metric decides which that is.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        PartialState().wait_for_everyone()  # every process adds its rollouts and its random state
        if args.should_save:
            folder = Path(args.output_dir or "")
            mark(folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            rotate(folder, self.keep, state.best_global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.should_save:  # what a kill left half-written or half-deleted, where no newer checkpoint was saved
            rotate(Path(args.output_dir or ""), self.keep, state.best_global_step)


class StepBegun(TrainerCallback):
    """Keeps what a step changes before it changes the weights, so that a step which fails can begin again.

    Attributes:
        intact: whether the weights are still those with which the current step began.
    """

    intact = False

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.on_random_state_loaded = self._keep
        self._kept: tuple[Any, ...] | None = None

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._keep()

    def _keep(self) -> None:
        """The first step of an epoch begins here: the data loader draws from the random state before it."""
        self._kept = random.getstate(), numpy.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._kept is None:
            self._keep()
        self.random, self._kept = self._kept, None
        trainer = self.trainer
        self.micro_batches, self.tokens, self.flos = trainer._step, state.num_input_tokens_seen, trainer.current_flos
        self.rollouts = trainer._buffered_inputs if trainer.amid_rollouts else None
        self.intact = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.intact = False

    def restore(self) -> None:
        """Puts all of it back, so that the step can begin again."""
        assert self.random is not None
        random.setstate(self.random[0])
        numpy.random.set_state(self.random[1])
        torch.set_rng_state(self.random[2])
        torch.cuda.set_rng_state_all(self.random[3])
        trainer = self.trainer
        trainer._step, trainer._buffered_inputs, trainer.current_flos = self.micro_batches, self.rollouts, self.flos
        trainer.state.num_input_tokens_seen = self.tokens


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
    state = {
        "step": trainer._step,
        "rollouts": trainer.unused_rollouts() if trainer.amid_rollouts else None,
        "teacher_moved": trainer.teacher_moved,
        "processes": accelerator.num_processes,
    }
    torch.save(state, folder / _rollouts_file(accelerator.process_index))
    tensors = {} if trainer.teacher is None else trainer.teacher.state_dict()
    if tensors and (accelerator.is_main_process or trainer.sharded):
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / _teacher_file(trainer))


@contextmanager
def rotating_later(trainer: Any) -> Iterator[None]:
    """Lets transformers delete old checkpoints, as `save_total_limit` has it, once ours is written too.

    It would do so before the teacher and the rollouts are in the new one, without which nothing can go on.
    """
    args, limit = trainer.args, trainer.args.save_total_limit
    args.save_total_limit = None
    try:
        yield
    finally:
        args.save_total_limit = limit
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        rotate_checkpoints(args.output_dir, limit, trainer.state.best_model_checkpoint, use_mtime=True)


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
        trainer.teacher_moved = state["teacher_moved"]


def _teacher_file(trainer: Any) -> str:
    """Of a sharded teacher each process keeps its shards."""
    return f"teacher-{trainer.accelerator.process_index}.safetensors" if trainer.sharded else TEACHER


def _rollouts_file(process: int | str) -> str:
    return f"rollouts-{process}.pt"
