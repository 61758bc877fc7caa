"""Which tokens are learned from, and with which weight: decided once for a batch of rollouts, before any loss.

Weights are such that their sums over the micro-batches that were sampled together, and over processes, are the mean
that is asked for. An optimizer step takes its window's part of them, which the trainer scales to a whole.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfdistill.config.settings import Distillation
from selfdistill.losses.aggregation import aggregation_normalizer, aggregation_weights
from selfdistill.rollout import Rollouts
from selfdistill.teachers.context import SCORE_TOLERANCE

# Averages a tensor over the processes.
Reduce = Callable[[Tensor], Tensor]


def distilled_tokens(
    rollouts: Rollouts, learnable: Int[Tensor, "B T"], settings: Distillation
) -> tuple[Bool[Tensor, "B T"], Int[Tensor, "B T"]]:
    """The tokens for which the teacher gives a signal, and those that could have had one.

    Args:
        rollouts: with what the teacher is shown.
        learnable: 1 for the tokens that the student wrote itself, tool results and padding left out.
    """
    device = learnable.device
    counted = learnable * (torch.arange(learnable.size(1), device=device) >= settings.skip_tokens)
    signal = [prompt is not None for prompt in rollouts.teacher_prompts]
    if settings.route == "failures":
        signal = [s and _failed(score, settings) for s, score in zip(signal, rollouts.scores, strict=True)]
    active = torch.tensor(signal, device=device) & counted.any(dim=1)
    return counted.bool() & active[:, None], counted


def _failed(score: float | None, settings: Distillation) -> bool:
    return score is None or score < settings.success_threshold - SCORE_TOLERANCE


def distillation_weights(
    distilled: Bool[Tensor, "B T"],
    counted: Int[Tensor, "B T"],
    settings: Distillation,
    *,
    max_completion_tokens: int,
    reduce: Reduce,
) -> Float[Tensor, "B T"]:
    """Each token's weight in the divergence, aggregated over all rollouts that were sampled together."""
    active, inactive_count = distilled.any(dim=1), settings.count_inactive_rows
    normalizer = reduce(
        aggregation_normalizer(counted, settings.aggregation, row_active=active, count_inactive_rows=inactive_count)
    )
    return aggregation_weights(
        counted,
        settings.aggregation,
        row_active=active,
        count_inactive_rows=inactive_count,
        max_completion_tokens=max_completion_tokens,
        normalizer=normalizer,
    )


def demonstration_weights(
    rollouts: Rollouts, completion_mask: Int[Tensor, "B T"], reduce: Reduce
) -> Float[Tensor, "B T"]:
    """Each token's weight in the cross-entropy: a mean over demonstrated tokens, times the share of such rows."""
    demonstrated = torch.tensor(rollouts.demonstrated, device=completion_mask.device)
    tokens = reduce(
        aggregation_normalizer(completion_mask, "token_mean", row_active=demonstrated, count_inactive_rows=False)
    )
    weights = aggregation_weights(
        completion_mask, "token_mean", row_active=demonstrated, count_inactive_rows=False, normalizer=tokens
    )
    return weights * reduce(demonstrated.float().mean())


def spread_tokens(mask: Bool[Tensor, "B T"], per_row: int) -> Bool[Tensor, "B T"]:
    """Up to `per_row` tokens of each row's, evenly spread; which ones does not depend on the other rows."""
    place = mask.cumsum(dim=1) - 1
    wanted = mask.sum(dim=1, keepdim=True) * torch.arange(per_row, device=mask.device) // per_row
    return mask & (place[:, :, None] == wanted[:, None, :]).any(dim=-1)
