"""Time and peak memory of the phases of a training step, by the same rule for every trainer.

A phase is the time inside one of a trainer's own methods. What is left of a step is `update`: the student's passes,
loss, backward pass and optimizer. Phases may lie in one another; each second counts for the innermost one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Any

import torch
from transformers import TrainerCallback

from experiments.gpu.device import Device, UsedMemory

UPDATE = "update"
PHASES = ("generate", "reward", "teacher", UPDATE)
METHODS = {
    "_generate_single_turn": "generate",  # ours, TRL's GRPO and Distillation
    "_generate": "generate",  # TRL's SDFT and SDPO
    "_calculate_rewards": "reward",
    "_ask_teacher": "teacher",  # ours
}
# The same methods serve student and teacher: without gradient they are asked about somebody else, or about the student
# as it was when it sampled.
METHODS_WITHOUT_GRADIENT = {
    "_forward_logits": "teacher",  # TRL's SDFT and SDPO
    "_get_last_hidden_state": "teacher",  # TRL's Distillation
    "_get_per_token_logps_and_entropies": "teacher",  # the reference of the KL penalty, ours and GRPO
}


@dataclass
class Phase:
    """What a phase took in one step.

    Attributes:
        peak_gib: the most that torch had allocated; on a CPU what the process had in memory.
        used_gib: the most that was in use on the whole GPU, a colocated vLLM included; 0 on a CPU.
    """

    seconds: float = 0.0
    peak_gib: float = 0.0
    used_gib: float = 0.0


class Meter(TrainerCallback):
    """Watches a trainer: `trainer.add_callback(Meter(device).watch(trainer))`, as the last callback.

    Attributes:
        steps: one dictionary of phases for each optimizer step that is over.
        ended_at: the wall clock at the end of each step, in seconds since the epoch.
    """

    def __init__(self, device: Device, memory: UsedMemory) -> None:
        self.device, self.memory = device, memory
        self.steps: list[dict[str, Phase]] = []
        self.ended_at: list[float] = []
        self._under_way: list[str] = []  # the phases that the present moment lies in, the innermost last
        self._now: dict[str, Phase] = {}
        self._since = 0.0

    def watch(self, trainer: Any) -> "Meter":
        """Wraps those of the trainer's methods that make up the phases."""
        for names, only_without_gradient in ((METHODS, False), (METHODS_WITHOUT_GRADIENT, True)):
            for name, phase in names.items():
                method = getattr(trainer, name, None)
                if method is not None:
                    setattr(trainer, name, self._measured(method, phase, only_without_gradient))
        return self

    def _measured(self, method: Callable[..., Any], phase: str, only_without_gradient: bool) -> Callable[..., Any]:
        @wraps(method)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if only_without_gradient and torch.is_grad_enabled():
                return method(*args, **kwargs)
            with self.phase(phase):
                return method(*args, **kwargs)

        return measured

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A stretch of the step that counts for this phase; outside of a step nothing is measured."""
        if not self._under_way:
            yield
            return
        self._book()
        self._under_way.append(name)
        try:
            yield
        finally:
            self._book()
            self._under_way.pop()

    def _book(self) -> None:
        """Time and memory since the last border go to the innermost phase."""
        self.device.wait()
        phase = self._now.setdefault(self._under_way[-1], Phase())
        phase.seconds += time.perf_counter() - self._since
        phase.peak_gib = max(phase.peak_gib, self.device.peak_gib())
        phase.used_gib = max(phase.used_gib, self.memory.take_gib())
        self.device.reset_peak()
        self._since = time.perf_counter()

    def begin(self) -> None:
        """A step begins."""
        self.device.wait()
        self.device.reset_peak()
        self.memory.take_gib()
        self._under_way, self._now, self._since = [UPDATE], {}, time.perf_counter()

    def end(self) -> None:
        """The step is over."""
        self._book()
        self._under_way = []
        self.steps.append(self._now)
        self.ended_at.append(time.time())

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end()

    def as_json(self) -> list[dict[str, dict[str, float]]]:
        return [{name: asdict(phase) for name, phase in step.items()} for step in self.steps]
