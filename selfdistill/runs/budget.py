"""A training that ends when its seconds or its generated tokens are spent: so methods of different speed compare."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from selfdistill.training.metrics import greatest_of_all_processes


class Budget(TrainerCallback, ExportableState):
    """Ends the training in good order after the first step at which the budget is spent.

    The seconds are those of optimizer steps: generation, scores, teacher and update, without set-up, evaluations and
    checkpoints. Checkpoints hold them, so that a resumed run goes on from there.

    Args:
        seconds: of all steps together; None sets no limit.
        tokens: generated ones; None sets no limit.
        generated: how many have been generated so far, on all processes.

    Attributes:
        spent_s: seconds of the steps so far.
    """

    def __init__(self, seconds: float | None, tokens: int | None, generated: Callable[[], int]) -> None:
        self.seconds, self.tokens, self.generated = seconds, tokens, generated
        self.spent_s = 0.0
        self._began: float | None = None

    @property
    def share(self) -> float:
        """How much of the budget is spent, from 0 to 1 and a little more; 0 where there is none."""
        return max((spent / limit for spent, limit in self._limits()), default=0.0)

    @property
    def left_s(self) -> float | None:
        """Seconds until the budget is spent at the pace so far; None where there is none, or no step has been taken."""
        pace = ((limit / spent - 1) * self.spent_s for spent, limit in self._limits() if spent and self.spent_s)
        return min((max(0.0, left) for left in pace), default=None)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"spent_s": self.spent_s}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        callbacks: Any = state.stateful_callbacks or {}
        kept = callbacks.get(type(self).__name__)
        self.spent_s = kept["attributes"]["spent_s"] if kept else 0.0
        self._stop_if_spent(args, control)  # where it was killed before its end could be written, it takes no more step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._began is not None:
            self.spent_s += time.monotonic() - self._began
        self._stop_if_spent(args, control)

    def _stop_if_spent(self, args: TrainingArguments, control: TrainerControl) -> None:
        # The clocks of several processes differ, and all must end at the same step.
        if self._limits() and greatest_of_all_processes(int(self.share >= 1), args):
            control.should_training_stop = True

    def _limits(self) -> list[tuple[float, float]]:
        spent = ((self.spent_s, self.seconds), (float(self.generated()), self.tokens))
        return [(value, limit) for value, limit in spent if limit is not None]
