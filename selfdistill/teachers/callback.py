"""Keeps a teacher's weights in step with training."""

from typing import Any

from transformers import TrainerCallback

from selfdistill.teachers.weights import Weights


class TeacherCallback(TrainerCallback):
    """Updates the weights after every optimizer step, unless their cadence is another one."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.weights.cadence == "step":
            self.weights.update(state.global_step)
