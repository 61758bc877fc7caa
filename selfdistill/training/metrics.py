"""Means of what every process notes between two logged steps."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainingArguments


def greatest_of_all_processes(number: int, args: TrainingArguments) -> int:
    """The greatest number among the processes that train together. A collective call."""
    if args.world_size < 2:
        return number
    numbers = torch.tensor([number], device=args.device)
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
    return int(numbers.item())


class Means:
    """Sums and counts by name; the mean over all processes is that of one process with the whole batch."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Adds to a metric: the sum of `count` values."""
        before, counted = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = before + total, counted + count

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of every metric over all processes, 0 where nothing was counted; begins anew. A collective call."""
        processes = gather_object([self._sums]) if accelerator.num_processes > 1 else [self._sums]
        names = dict.fromkeys(name for sums in processes for name in sums)
        found = {name: [sums[name] for sums in processes if name in sums] for name in names}
        self._sums = {}
        return {name: sum(s for s, _ in pairs) / max(sum(n for _, n in pairs), 1.0) for name, pairs in found.items()}
