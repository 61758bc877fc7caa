"""From a loss per token to one number. Which tokens and rows count, and what the sum is divided by, are choices."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")

Mask = Float[Tensor, "B T"] | Bool[Tensor, "B T"] | Int[Tensor, "B T"]
RowMask = Float[Tensor, " B"] | Bool[Tensor, " B"] | Int[Tensor, " B"]
Scalar = Float[Tensor, ""] | Int[Tensor, ""] | float


def aggregation_normalizer(
    mask: Mask, mode: str, *, row_active: RowMask | None = None, count_inactive_rows: bool = True
) -> Float[Tensor, ""]:
    """What this batch adds to the denominator: tokens for `token_mean`, rows for the others.

    Sum it over all batches of an accumulation window (and over processes, then divide by their number) and give it as
    `normalizer`: the window's loss is then that of one large batch.

    Raises:
        ValueError: unknown mode.
    """
    _check_mode(mode)
    mask = mask.to(torch.float32)
    active = _active(mask, row_active)
    if mode == "token_mean":
        return mask.sum() if count_inactive_rows else (mask * active[:, None]).sum()
    return active.new_tensor(len(active)) if count_inactive_rows else active.sum()


def aggregation_weights(
    mask: Mask,
    mode: str,
    *,
    row_active: RowMask | None = None,
    count_inactive_rows: bool = True,
    max_completion_tokens: int | None = None,
    normalizer: Scalar | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B T"]:
    """The weight of each token, such that `aggregate` is the weighted sum. Arguments: see `aggregate`.

    Known before any loss is: hand the valid tokens' weights to `chunked_token_divergence`, which then needs one pass.
    """
    if max_completion_tokens is not None and max_completion_tokens < 1:
        raise ValueError(f"max_completion_tokens must be at least 1, got {max_completion_tokens}")
    if normalizer is None:
        normalizer = aggregation_normalizer(mask, mode, row_active=row_active, count_inactive_rows=count_inactive_rows)
        if mode == "seq_mean_token_sum_norm":
            normalizer = 1.0
    _check_mode(mode)
    mask = mask.to(dtype)
    divisor = torch.as_tensor(normalizer, dtype=dtype, device=mask.device).detach()
    weights = mask * _active(mask, row_active)[:, None]
    if mode == "seq_mean_token_mean":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1.0)
    elif mode == "seq_mean_token_sum_norm":
        weights = weights / (max_completion_tokens or mask.shape[-1] or 1)
    # A window without anything to learn: 0 divided by 1.
    return weights / torch.where(divisor > 0, divisor, torch.ones_like(divisor))


def aggregate(
    per_token: Float[Tensor, "B T"],
    mask: Mask,
    mode: str,
    *,
    row_active: RowMask | None = None,
    count_inactive_rows: bool = True,
    max_completion_tokens: int | None = None,
    normalizer: Scalar | None = None,
) -> Float[Tensor, ""]:
    """One number from a loss per token.

    | mode | with m the mask, T_i the tokens of row i |
    |---|---|
    | `token_mean` | sum of all tokens / number of tokens: long rows weigh more |
    | `seq_mean_token_mean` | mean over rows of (sum over tokens / T_i): rows weigh the same |
    | `seq_mean_token_sum` | mean over rows of the sum over tokens |
    | `seq_mean_token_sum_norm` | sum of all tokens / max_completion_tokens; by rows only through `normalizer` |

    Masked tokens may hold anything, NaN too. With nothing active the result is 0 and still attached to the graph.

    Args:
        mask: 1 for tokens that count.
        row_active: rows that carry a signal; None: those with any token in the mask. Inactive rows add nothing to the
            sum.
        count_inactive_rows: whether they stay in the denominator. True, as in TRL and SDPO's own code, dilutes the
            loss where few rows are active; False doesn't.
        max_completion_tokens: a constant length for `seq_mean_token_sum_norm`; None: the width of the batch.
        normalizer: replaces the number of tokens (`token_mean`) or of rows (else) counted in this batch; see
            `aggregation_normalizer`.

    Raises:
        ValueError: unknown mode; max_completion_tokens below 1; shapes that differ.
    """
    if per_token.shape != mask.shape:
        raise ValueError(f"per_token {tuple(per_token.shape)}, mask {tuple(mask.shape)}")
    weights = aggregation_weights(
        mask,
        mode,
        row_active=row_active,
        count_inactive_rows=count_inactive_rows,
        max_completion_tokens=max_completion_tokens,
        normalizer=normalizer,
        dtype=per_token.dtype if per_token.dtype == torch.float64 else torch.float32,
    )
    return (per_token.masked_fill(weights == 0, 0.0) * weights).sum()


def _active(mask: Tensor, row_active: Tensor | None) -> Tensor:
    rows = mask.sum(-1) > 0 if row_active is None else row_active > 0
    return rows.to(mask.dtype)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"unknown aggregation {mode!r}; choose one of {', '.join(MODES)}")
