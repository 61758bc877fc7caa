"""Rows of similar length in the same micro-batch, so that little of its passes is padding."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from trl.trainer.utils import split_tensor_dict

MicroBatch = dict[str, Any]
IMAGES = "num_images"


def sorted_by_length(batches: Sequence[MicroBatch], window: int, *, whole: bool) -> list[MicroBatch]:
    """The same rows in micro-batches of the same size, the longest first within each window.

    Args:
        batches: micro-batches of rows; with images they are returned as they are.
        window: how many of them make one optimizer step, among which rows may be exchanged.
        whole: whether every row goes through the student, and not those alone that a teacher or a demonstration
            teaches.
    """
    if any(batch.get(IMAGES) is not None for batch in batches):
        return list(batches)
    found: list[MicroBatch] = []
    for start in range(0, len(batches), window):
        joined = {name: _join([batch[name] for batch in batches[start : start + window]]) for name in batches[start]}
        order = _tokens(joined, whole=whole).argsort(descending=True, stable=True)
        found += split_tensor_dict({name: _take(value, order) for name, value in joined.items()}, window)
    return found


def _tokens(rows: MicroBatch, *, whole: bool) -> Int[Tensor, " B"]:
    """How many tokens of each row go through student and teacher."""
    completion = rows["completion_mask"].sum(dim=1)
    nobody = torch.zeros_like(completion, dtype=torch.bool)
    distilled = rows["distill_mask"].any(dim=1) if "distill_mask" in rows else nobody
    demonstrated = (rows["demonstration_weights"] > 0).any(dim=1) if "demonstration_weights" in rows else nobody
    student = (distilled | demonstrated | whole) * (rows["prompt_mask"].sum(dim=1) + completion)
    if "teacher_prompt_mask" not in rows:
        return student
    return student + distilled * (rows["teacher_prompt_mask"].sum(dim=1) + completion)


def _join(values: Sequence[Any]) -> Any:
    """What stands for each row, one batch behind the other; what stands once for all of them is the same in each."""
    first = values[0]
    if isinstance(first, Tensor) and first.dim():
        return torch.cat(list(values))
    return [item for value in values for item in value] if isinstance(first, list) else first


def _take(value: Any, order: Tensor) -> Any:
    if isinstance(value, Tensor) and value.dim():
        return value[order]
    return [value[i] for i in order.tolist()] if isinstance(value, list) else value
