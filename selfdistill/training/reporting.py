"""Metrics have the same names in W&B and Trackio, whether a run was started on the command line or from Python."""

from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import TrackioCallback, WandbCallback

from selfdistill.evaluation.monitors import standard_names

# transformers logs it with the totals of a training, which belong to no step.
TOTALS = "train_runtime"


def _row(logs: dict[str, Any], step: int) -> dict[str, Any]:
    """Metrics without the prefix `train/` that transformers gives them; those of an evaluation stay under `eval/`."""
    named = {f"eval/{name[5:]}" if name.startswith("eval_") else name: value for name, value in logs.items()}
    return standard_names(named) | {"step": step}


class _StandardNames(TrainerCallback):
    """Stands before a callback of transformers, and sends what is logged in its place."""

    _initialized: bool
    setup: Callable[..., None]

    def send(self, row: dict[str, Any]) -> None:
        """Sends a step's metrics, the step among them."""
        raise NotImplementedError

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        if TOTALS in logs:
            super().on_log(args, state, control, model=model, logs=logs, **kwargs)
            return
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            self.send(_row(logs, state.global_step))


class StandardWandb(_StandardNames, WandbCallback):
    """transformers' callback for W&B, which also sets up the run."""

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            self._wandb.define_metric("step")
            self._wandb.define_metric("*", step_metric="step", step_sync=True)

    def send(self, row: dict[str, Any]) -> None:
        self._wandb.log(row)


class StandardTrackio(_StandardNames, TrackioCallback):
    """transformers' callback for Trackio, which also sets up the run."""

    def send(self, row: dict[str, Any]) -> None:
        self._trackio.log(row, step=row.pop("step"))


def use_standard_names(trainer: Trainer) -> None:
    """Puts the callbacks of this module in the places of transformers' own, where the trainer has these."""
    ours: dict[type, type[TrainerCallback]] = {WandbCallback: StandardWandb, TrackioCallback: StandardTrackio}
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [ours[type(callback)]() if type(callback) in ours else callback for callback in callbacks]
