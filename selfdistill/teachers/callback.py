"""Keeps a teacher's weights in step with training, and in its checkpoints."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selfdistill.errors import UserError
from selfdistill.teachers.weights import Weights

FILE = "teacher.safetensors"


class TeacherCallback(TrainerCallback):
    """Updates after every optimizer step (by the weights' cadence), saves into and restores from the checkpoint."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.weights.cadence == "step":
            self.weights.update(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.should_save and (tensors := self.weights.state_dict()):
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / FILE)

    def restore(self, checkpoint: Path) -> None:
        """Raises UserError when the checkpoint was written without this teacher."""
        if not self.weights.state_dict():
            return
        if not (checkpoint / FILE).exists():
            raise UserError(f"{checkpoint} has no {FILE}: it was written without this teacher and cannot be continued with it.")
        self.weights.load_state_dict(load_file(checkpoint / FILE))
