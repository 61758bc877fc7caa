"""Losses on logits that are never held whole: project a few tokens, take value and gradient, overwrite, go on.

A loss per token needs its logits for a moment only. `token_losses` projects a chunk of hidden states to logits, lets
the loss overwrite them with its own gradient, and multiplies that back to the hidden states at once, in the forward
pass. The backward pass then only scales rows. This is the idea of Liger's fused linear cross-entropy
(arXiv 2410.10989).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfdistill.losses import head as heads
from selfdistill.losses.head import Head, logits_dtype

# Logits held at a time, per model: 128 MiB in float32 on a CPU, 256 MiB on a GPU. Products of fewer rows are slower.
CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_GPU = 2**25, 2**26
# The loss itself goes through a chunk in blocks: on a CPU such that all it touches stays in the cache.
BLOCK_ELEMENTS_CPU, BLOCK_ELEMENTS_GPU = 2**22, 2**26
# Tokens taken at a time where only a sum over the vocabulary is wanted.
TILE_TOKENS = 2048


@dataclass(frozen=True)
class HeadedStates:
    """Hidden states with the head that makes logits of them, or two such whose logits are mixed.

    Attributes:
        sides: hidden states (N, H) and head, once or twice.
        coef: with two sides the logits are (1 - coef)·first + coef·second.
    """

    sides: Sequence[tuple[Tensor, Head]]
    coef: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        hidden, head = self.sides[0]
        return logits_dtype(hidden, head.weight)

    def project(self, rows: slice, out: list[Tensor]) -> None:
        """The bare products of some tokens, one for each side."""
        for (hidden, head), logits in zip(self.sides, out, strict=True):
            head.project(hidden[rows], out=logits)

    def finish_(self, products: list[Tensor]) -> Tensor:
        """Logits from the products, in the first one's memory."""
        return self._mix_([head.finish_(x) for (_, head), x in zip(self.sides, products, strict=True)])

    def logits_at(self, rows: slice, ids: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """Logits of some entries."""
        return self._mix_([head.logits_at(hidden[rows], ids, self.dtype) for hidden, head in self.sides])

    def logsumexp(self) -> Float[Tensor, " N"]:
        """Of all logits of each token; only a tile of tokens and columns is held."""
        hidden = self.sides[0][0]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            parts = [self._logsumexp(slice(i, i + TILE_TOKENS)) for i in range(0, len(hidden), TILE_TOKENS)]
        return torch.cat(parts) if parts else hidden.new_empty(0, dtype=self.dtype)

    def _logsumexp(self, rows: slice) -> Tensor:
        hidden = [hidden[rows] for hidden, _ in self.sides]
        columns = min(heads.TILE_COLUMNS, len(self.sides[0][1].weight))
        buffers = [x.new_empty(len(x) * columns, dtype=self.dtype) for x in hidden]
        total = hidden[0].new_full((len(hidden[0]), 1), -math.inf, dtype=self.dtype)
        for tiles in zip(*(head.tiles() for _, head in self.sides), strict=True):
            products = []
            for x, buffer, (_, head) in zip(hidden, buffers, tiles, strict=True):
                products.append(buffer[: len(x) * len(head.weight)].view(len(x), -1))
                head.project(x, out=products[-1])
            total = torch.logaddexp(total, self._tile_logsumexp_(self.finish_(products)))
        return total.squeeze(-1)

    def _tile_logsumexp_(self, logits: Tensor) -> Tensor:
        """(n, 1) of a tile (n, c), which is overwritten."""
        if self.sides[0][1].bias is not None:  # one of minus infinity may forbid every token of a tile
            return logits.logsumexp(-1, keepdim=True)
        # log_softmax subtracts the wanted sum from every entry, so one entry before and after gives it back: this takes
        # half the time of logsumexp.
        entry = logits[:, :1].clone()
        torch.log_softmax(logits, dim=-1, out=logits)
        return entry.sub_(logits[:, :1])

    def _mix_(self, logits: list[Tensor]) -> Tensor:
        return logits[0] if len(logits) == 1 else logits[0].lerp_(logits[1], self.coef)


def softmax_(logits: Tensor, out: Tensor, largest: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Probabilities into `out`, which may be the logits; returns the log of the sum of exp, (n, 1).

    Args:
        largest: value and index (n, 1) of the largest logit where they are known, which saves two passes.
    """
    top = logits.amax(-1, keepdim=True) if largest is None else largest[0]
    torch.softmax(logits, dim=-1, out=out)
    # The largest probability never underflows, so its log gives the normaliser without another pass of exp.
    most = out.amax(-1, keepdim=True) if largest is None else out.gather(-1, largest[1])
    return top - most.log_()


# Called as loss(student_logits, teacher_logits or None, rows, wants_gradient) with the logits of the tokens in `rows`.
# It returns the value per token. It overwrites the student's logits, with the gradient where that is wanted, and may
# overwrite the teacher's too.
LogitsLoss = Callable[[Tensor, Tensor | None, slice, bool], Tensor]


@dataclass(frozen=True)
class ChunkedPass:
    """One loss over all tokens, a chunk of them at a time.

    Attributes:
        head: the student's.
        loss: value and gradient of some rows of logits.
        chunk_tokens: tokens whose logits are held at a time; None decides by memory.
        teacher: where the loss takes the teacher's logits from.
        tensors: how many tensors of the size of the logits the loss works with, for the size of its blocks.

    Raises:
        ValueError: chunk_tokens below 1; another vocabulary in the teacher's head.
    """

    head: Head
    loss: LogitsLoss
    chunk_tokens: int | None = None
    teacher: HeadedStates | None = None
    tensors: int = 1

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")

    def run(
        self,
        hidden: Tensor,
        *,
        grad_hidden: Tensor | None = None,
        grad_weight: Tensor | None = None,
        grad_bias: Tensor | None = None,
        weights: Tensor,
    ) -> Tensor:
        """Values (N,). Fills the gradients given: of each value in `grad_hidden`, of the weighted sum in the others."""
        tokens, vocabulary = len(hidden), len(self.head.weight)
        wants_gradient = any(g is not None for g in (grad_hidden, grad_weight, grad_bias))
        dtype = logits_dtype(hidden, self.head.weight)
        values = hidden.new_empty(tokens, dtype=dtype)
        chunk, block = self._sizes(tokens, vocabulary, hidden.is_cuda)
        student = hidden.new_empty(chunk, vocabulary, dtype=dtype)
        teacher = (
            [torch.empty_like(student, dtype=self.teacher.dtype) for _ in self.teacher.sides] if self.teacher else []
        )
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            logits = student[: rows.stop - start]
            self.head.project(hidden[rows], out=logits)
            if self.teacher:
                self.teacher.project(rows, out=[x[: len(logits)] for x in teacher])
            for first in range(0, len(logits), block):
                part = slice(first, min(first + block, len(logits)))
                at = slice(start + part.start, start + part.stop)
                values[at] = self._block(logits[part], [x[part] for x in teacher], at, wants_gradient)
            if grad_hidden is not None:
                self.head.pull_back(logits, out=grad_hidden[rows])
            if grad_weight is not None:
                self.head.add_gradient(logits, hidden[rows].to(dtype) * weights[rows, None], out=grad_weight)
            if grad_bias is not None:
                grad_bias.addmv_(logits.T, weights[rows], alpha=self.head.linear_scale)
        return values

    def _block(self, student: Tensor, teacher: list[Tensor], rows: slice, wants_gradient: bool) -> Tensor:
        self.head.finish_(student)
        slope = self.head.slope(student) if wants_gradient else None
        values = self.loss(student, self.teacher.finish_(teacher) if self.teacher else None, rows, wants_gradient)
        if slope is not None:
            student.mul_(slope)
        return values

    def _sizes(self, tokens: int, vocabulary: int, gpu: bool) -> tuple[int, int]:
        """Tokens of a chunk and of a block."""
        if not tokens:
            return 1, 1
        chunk_elements, block_elements = (
            (CHUNK_ELEMENTS_GPU, BLOCK_ELEMENTS_GPU) if gpu else (CHUNK_ELEMENTS_CPU, BLOCK_ELEMENTS_CPU)
        )
        limit = self.chunk_tokens or max(1, chunk_elements // vocabulary)
        # Chunks of equal size: no short last one.
        chunk = math.ceil(tokens / math.ceil(tokens / limit))
        return chunk, max(1, block_elements // (self.tensors * vocabulary), 1 if gpu else torch.get_num_threads())


def token_losses(
    hidden: Float[Tensor, "N H"], head: Head, chunked: ChunkedPass, weights: Float[Tensor, " N"] | None
) -> Float[Tensor, " N"]:
    """Values of the loss, differentiable in `hidden` and in the head's weight (V, H) and bias (V,).

    Always exact. The gradient of the head needs to know what each value is multiplied by later; the forward pass takes
    `weights` (default: all the same) for that, and the backward pass repeats the work if it was something else.

    Args:
        head: the student's with its gradient; the one in `chunked` has none.
    """
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    values: Tensor = _TokenLosses.apply(hidden, weight, bias, chunked, weights)
    return values


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunked: ChunkedPass, weights: Tensor | None
    ) -> Tensor:
        dtype = logits_dtype(hidden, weight)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        ctx.chunked = chunked
        weights = torch.ones_like(hidden[:, 0], dtype=dtype) if weights is None else weights.detach().to(dtype)
        head_gradients = _head_gradients(ctx, weight, bias, dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            values = chunked.run(hidden, grad_hidden=grad_hidden, weights=weights, **head_gradients)
        # Kept aside and not by save_for_backward: the first backward pass scales them in place instead of copying them.
        ctx.head_gradients = head_gradients
        ctx.save_for_backward(hidden, weight, bias, weights, grad_hidden)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, weights, grad_hidden = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_values[:, None]).to(hidden.dtype)
        if not any(ctx.needs_input_grad[1:3]):
            return grad_hidden, None, None, None, None

        known, ctx.head_gradients = ctx.head_gradients, None
        factor = None if known is None else _common_factor(grad_values, weights)
        if factor is None:
            factor, known = 1.0, _head_gradients(ctx, weight, bias, grad_values.dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                ctx.chunked.run(hidden, weights=grad_values, **known)
        of_weight, of_bias = known["grad_weight"], known["grad_bias"]
        of_weight = None if of_weight is None else of_weight.mul_(factor).to(weight.dtype)
        of_bias = None if of_bias is None else of_bias.mul_(factor).to(bias.dtype)
        return grad_hidden, of_weight, of_bias, None, None


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
