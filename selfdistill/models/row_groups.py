"""Which rows of a batch go through a model together, so that little of a pass is padding.

Rows do not see one another. So a row has the same values and gradients whatever rows are beside it, and rows of similar
length may go through the model apart from the others. That holds for every architecture, also where a layer carries a
state from token to token, since each row stays whole and in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

# What a further pass costs, in tokens that might as well be padding: on a CPU 75 for a small model, as measured by
# experiments/benchmarks/padding.py; on a GPU, where it is the time of starting a model's kernels, an estimate.
PASS_TOKENS_CPU, PASS_TOKENS_GPU = 128, 1024
# Where a pass is a collective call, every process makes as many as it must, whatever they cost.
NEVER_FURTHER = 10**12


@dataclass(frozen=True)
class RowGroup:
    """Rows that go through a model together.

    Attributes:
        rows: their indices, in the order of the batch.
        prompt_tokens, completion_tokens: of the longest prompt and of the longest completion among them; at least one.
    """

    rows: list[int]
    prompt_tokens: int
    completion_tokens: int


def row_groups(
    prompt_mask: Int[Tensor, "B P"],
    completion_mask: Int[Tensor, "B T"],
    *,
    most_rows: int | None = None,
    together: bool = False,
) -> list[RowGroup]:
    """Groups of rows such that the tokens of all passes, padding included, and the cost of the passes are fewest.

    Every row of a pass has as many columns as the longest prompt of the group and its longest completion have together.

    Args:
        most_rows: of a group.
        together: whether as few groups as possible are wanted, as where something is computed over all rows.
    """
    prompts, completions = (mask.sum(dim=1).tolist() for mask in (prompt_mask, completion_mask))
    further = NEVER_FURTHER if together or _is_collective() else _pass_tokens(prompt_mask.device)
    order = sorted(range(len(prompts)), key=lambda row: (prompts[row] + completions[row], prompts[row]))
    pairs = [(prompts[row], completions[row]) for row in order]
    cuts = _cheapest_cuts(pairs, most_rows or len(pairs), further)
    return [
        RowGroup(sorted(order[begin:end]), *(max(1, *sizes) for sizes in zip(*pairs[begin:end], strict=True)))
        for begin, end in zip([0, *cuts], cuts, strict=False)
    ]


def _cheapest_cuts(pairs: Sequence[tuple[int, int]], most_rows: int, further: int) -> list[int]:
    """Where the groups of neighbours end that take the fewest tokens."""
    cost, begins = [0], [0]  # of the best groups of the first rows, and where the last of these groups begins
    for end in range(1, len(pairs) + 1):
        prompt, completion, best, first = 0, 0, None, end - 1
        for begin in range(end - 1, max(-1, end - most_rows - 1), -1):
            prompt, completion = max(prompt, pairs[begin][0]), max(completion, pairs[begin][1])
            total = cost[begin] + (end - begin) * (prompt + completion) + further
            if best is None or total < best:
                best, first = total, begin
        assert best is not None
        cost.append(best)
        begins.append(first)
    cuts, end = [], len(pairs)
    while end:
        cuts.append(end)
        end = begins[end]
    return cuts[::-1]


def _pass_tokens(device: torch.device) -> int:
    return PASS_TOKENS_CPU if device.type == "cpu" else PASS_TOKENS_GPU


def _is_collective() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and _processes() > 1


def _processes() -> int:
    return torch.distributed.get_world_size()


def in_row_order(parts: Sequence[Tensor], groups: Sequence[RowGroup], columns: int) -> Tensor:
    """One tensor of what each group gave for its rows (R, t, …), with zeros up to so many columns."""
    widened = [
        torch.cat([part, part.new_zeros(len(part), columns - part.size(1), *part.shape[2:])], dim=1) for part in parts
    ]
    rows = torch.tensor([row for group in groups for row in group.rows], device=parts[0].device)
    return torch.cat(widened)[rows.argsort()]
