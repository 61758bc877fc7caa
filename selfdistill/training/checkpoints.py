"""What a checkpoint needs beyond what transformers saves, so that a resumed run ends with the unbroken run's numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from trl.trainer.utils import RepeatSampler

from selfdistill.errors import UserError
from selfdistill.training.distiller import SCORE_REQUEST

TEACHER = "teacher.safetensors"


class ResumableSampler(RepeatSampler):
    """TRL's sampler, whose order in an epoch depends on seed and epoch alone.

    TRL's draws each epoch's order from a generator that starts anew when a run is resumed, so that a run resumed in its
    second epoch would see the order of the first. The orders themselves are the same here as there.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


def save(folder: Path, trainer: Any) -> None:
    """Adds the teacher's weights, the number of micro-batches done and rollouts not used up yet to a checkpoint."""
    accelerator = trainer.accelerator
    generate_every = trainer.args.steps_per_generation * trainer.num_iterations
    rollouts = None
    if trainer._step % generate_every:
        rollouts = [{k: v for k, v in batch.items() if k != SCORE_REQUEST} for batch in trainer._buffered_inputs]
    torch.save({"step": trainer._step, "rollouts": rollouts}, folder / _rollouts_file(accelerator.process_index))
    weights = getattr(trainer.teacher, "weights", None)
    if accelerator.is_main_process and weights is not None and (tensors := weights.state_dict()):
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TEACHER)


def restore(folder: Path, trainer: Any) -> None:
    """Takes up what `save` wrote.

    Raises:
        UserError: the checkpoint was written without this teacher.
    """
    accelerator = trainer.accelerator
    weights = getattr(trainer.teacher, "weights", None)
    if weights is not None and weights.state_dict():
        if not (folder / TEACHER).exists():
            raise UserError(
                f"{folder} has no {TEACHER}: it was written without this teacher and cannot be continued with it."
            )
        weights.load_state_dict(load_file(folder / TEACHER))
    file = folder / _rollouts_file(accelerator.process_index)
    if file.exists():
        state = torch.load(file, map_location=accelerator.device, weights_only=True)
        trainer._step, trainer._buffered_inputs = state["step"], state["rollouts"]


def _rollouts_file(process: int) -> str:
    return f"rollouts-{process}.pt"
