"""Losses on logits that are never held: project a few tokens, take value and gradient, overwrite, go on.

A loss per token needs its logits for a moment only. `token_losses` projects a chunk of hidden states to logits, lets
the loss overwrite them with its own gradient, and multiplies that back to the hidden states at once, in the forward
pass. The backward pass then only scales rows. This is the idea of Liger's fused linear cross-entropy (arXiv 2410.10989).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at a time, per model: 64 MiB in float32 on a CPU, 256 MiB on a GPU, which needs larger products.
CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_GPU = 2**24, 2**26
# On a CPU the loss itself goes through a chunk in blocks that stay in the cache.
BLOCK_ELEMENTS = 2**20
# Columns of the vocabulary that are widened at a time where weights are in half precision.
WIDENED_ROWS = 8192


@dataclass(frozen=True)
class Head:
    """From hidden states (N, H) to logits / temperature (N, V): cap·tanh(scale·(h Wᵀ + b) / cap) / temperature."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0

    @property
    def linear_scale(self) -> float:
        """The factor of the product; with a soft cap the temperature comes after it."""
        return self.scale if self.soft_cap else self.scale / self.temperature

    def project(self, hidden: Tensor, out: Tensor) -> None:
        """h Wᵀ + b into `out` (n, V)."""
        if self.weight.dtype == hidden.dtype == out.dtype:
            torch.mm(hidden, self.weight.T, out=out)
        else:
            for columns, weight in _row_blocks(self.weight):
                out[:, columns] = _product(hidden, weight.T, out.dtype)
        if self.bias is not None:
            out.add_(self.bias)

    def finish(self, logits: Tensor) -> None:
        """Scale, soft cap and temperature, in place."""
        if self.linear_scale != 1:
            logits.mul_(self.linear_scale)
        if self.soft_cap:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the soft cap and what follows it, from finished logits; None where there is no cap."""
        if not self.soft_cap:
            return None
        tanh = logits * (self.temperature / self.soft_cap)
        return tanh.square_().neg_().add_(1).div_(self.temperature)

    def pull_back(self, gradient: Tensor, out: Tensor) -> None:
        """gradient (n, V) of the scaled product to that of the hidden states, into `out` (n, H)."""
        if self.weight.dtype == gradient.dtype:
            torch.mm(gradient, self.weight, out=out)
        else:
            out.zero_()
            for columns, weight in _row_blocks(self.weight):
                out.add_(_product(gradient[:, columns], weight, out.dtype))
        out.mul_(self.linear_scale)

    def add_gradient(self, gradient: Tensor, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """Adds gradientᵀ·hidden to `weight` (V, H) and the column sums to `bias` (V,)."""
        if weight is not None:
            torch.addmm(weight, gradient.T, hidden, alpha=self.linear_scale, out=weight)
        if bias is not None:
            bias.add_(gradient.sum(0), alpha=self.linear_scale)


def _row_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(weight), WIDENED_ROWS):
        rows = slice(start, min(start + WIDENED_ROWS, len(weight)))
        yield rows, weight[rows]


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed in `dtype` whatever the operands are."""
    if right.is_cuda and right.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.to(right.dtype), right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


# Logits of the student and of each teacher for some tokens, and which tokens these are. Returns the value per token and,
# when asked to, overwrites the student's logits with their gradient.
RowLoss = Callable[[list[Tensor], slice, bool], Tensor]


@dataclass(frozen=True)
class Sweep:
    """One loss over all tokens: the student's head, teachers as (hidden, head), the loss, the tokens held at a time."""

    head: Head
    teachers: tuple[tuple[Tensor, Head], ...]
    loss: RowLoss
    chunk_tokens: int | None

    def run(
        self,
        hidden: Tensor,
        *,
        grad_hidden: Tensor | None = None,
        grad_weight: Tensor | None = None,
        grad_bias: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Values (N,). Fills the gradients given: of each value in `grad_hidden`, of the weighted sum in the others."""
        tokens, vocabulary = len(hidden), len(self.head.weight)
        wants_gradient = any(g is not None for g in (grad_hidden, grad_weight, grad_bias))
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, self.head.weight.dtype), torch.float32)
        values = hidden.new_empty(tokens, dtype=dtype)
        chunk = self._chunk(tokens, vocabulary, hidden.is_cuda)
        buffers = [hidden.new_empty(chunk, vocabulary, dtype=dtype) for _ in range(1 + len(self.teachers))]
        block = chunk if hidden.is_cuda else max(1, BLOCK_ELEMENTS // vocabulary)
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            chunk_logits = [buffer[: rows.stop - start] for buffer in buffers]
            self.head.project(hidden[rows], out=chunk_logits[0])
            for (teacher_hidden, head), logits in zip(self.teachers, chunk_logits[1:], strict=True):
                head.project(teacher_hidden[rows], out=logits)
            for first in range(start, rows.stop, block):
                part = slice(first, min(first + block, rows.stop))
                values[part] = self._block(
                    [x[first - start : part.stop - start] for x in chunk_logits], part, wants_gradient
                )
            if grad_hidden is not None:
                self.head.pull_back(chunk_logits[0], out=grad_hidden[rows])
            if weights is not None:
                weighted = hidden[rows].to(dtype) * weights[rows, None]
                self.head.add_gradient(chunk_logits[0], weighted, grad_weight, None)
                if grad_bias is not None:
                    self.head.add_gradient(chunk_logits[0] * weights[rows, None], weighted, None, grad_bias)
        return values

    def to(self, dtype: torch.dtype) -> "Sweep":
        """The same with hidden states and weights in another precision."""
        teachers = tuple((h.to(dtype), replace(head, weight=head.weight.to(dtype))) for h, head in self.teachers)
        return replace(self, head=replace(self.head, weight=self.head.weight.to(dtype)), teachers=teachers)

    def _block(self, logits: list[Tensor], rows: slice, wants_gradient: bool) -> Tensor:
        self.head.finish(logits[0])
        for (_, head), part in zip(self.teachers, logits[1:], strict=True):
            head.finish(part)
        slope = self.head.slope(logits[0]) if wants_gradient else None
        values = self.loss(logits, rows, wants_gradient)
        if slope is not None:
            logits[0].mul_(slope)
        return values

    def _chunk(self, tokens: int, vocabulary: int, gpu: bool) -> int:
        limit = self.chunk_tokens or max(1, (CHUNK_ELEMENTS_GPU if gpu else CHUNK_ELEMENTS_CPU) // vocabulary)
        # Chunks of equal size: no short last one.
        return math.ceil(tokens / math.ceil(tokens / limit)) if tokens else 1


def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, sweep: Sweep, weights: Tensor | None) -> Tensor:
    """Values (N,) of the sweep, differentiable in hidden (N, H), weight (V, H) and bias (V,).

    Always exact. The gradient of `weight` needs to know what each value is multiplied by later; the forward pass takes
    `weights` (default: all the same) for that, and the backward pass repeats the sweep if it was something else.
    """
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        # What a linear layer would do; float32 products would take many times as long.
        half = torch.get_autocast_dtype("cuda")
        hidden, weight, sweep = hidden.to(half), weight.to(half), sweep.to(half)
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    values: Tensor = _TokenLosses.apply(hidden, weight, bias, sweep, weights)
    return values


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, sweep: Sweep, weights: Tensor | None
    ) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        ctx.sweep = sweep
        weights = torch.ones_like(hidden[:, 0], dtype=dtype) if weights is None else weights.detach().to(dtype)
        head_gradients = _head_gradients(ctx, weight, bias, dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            values = sweep.run(hidden, grad_hidden=grad_hidden, weights=weights, **head_gradients)
        ctx.save_for_backward(hidden, weight, bias, weights, grad_hidden, *head_gradients.values())
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, weights, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_values[:, None]).to(hidden.dtype)
        if grad_weight is not None or grad_bias is not None:
            factor = _common_factor(grad_values, weights)
            if factor is None:
                factor = 1.0
                again = _head_gradients(ctx, weight, bias, grad_values.dtype)
                with torch.autocast(hidden.device.type, enabled=False):
                    ctx.sweep.run(hidden, weights=grad_values, **again)
                grad_weight, grad_bias = again["grad_weight"], again["grad_bias"]
            grad_weight = None if grad_weight is None else (grad_weight * factor).to(weight.dtype)
            grad_bias = None if grad_bias is None else (grad_bias * factor).to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _head_gradients(ctx: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {
        "grad_weight": torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None,
        "grad_bias": torch.zeros_like(bias, dtype=dtype) if bias is not None and ctx.needs_input_grad[2] else None,
    }


def _common_factor(gradient: Tensor, weights: Tensor) -> float | None:
    """c with gradient = c·weights up to rounding, or None."""
    tolerance = 16 * torch.finfo(gradient.dtype).eps
    gradient, weights = gradient.double(), weights.double()
    square = (weights * weights).sum()
    factor = torch.where(square > 0, (gradient * weights).sum() / square, 0.0)
    largest = gradient.abs().max() if len(gradient) else 0.0
    matches = ((gradient - factor * weights).abs() <= tolerance * largest).all()
    return float(factor) if matches else None
