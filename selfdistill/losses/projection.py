"""Losses on logits that are never held: project a few tokens, take value and gradient, overwrite, go on.

A loss per token needs its logits for a moment only. `token_losses` projects a chunk of hidden states to logits, lets
the loss overwrite them with its own gradient, and multiplies that back to the hidden states at once, in the forward
pass. The backward pass then only scales rows. This is the idea of Liger's fused linear
cross-entropy (arXiv 2410.10989).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at a time, per model: 128 MiB in float32 on a CPU, 256 MiB on a GPU. Products of fewer rows are slower.
CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_GPU = 2**25, 2**26
# The loss itself goes through a chunk in blocks: on a CPU such that all it touches stays in the cache.
BLOCK_ELEMENTS_CPU, BLOCK_ELEMENTS_GPU = 2**22, 2**26
# Tokens and columns of the vocabulary taken at a time where only a sum over the vocabulary is wanted.
TILE_TOKENS, TILE_COLUMNS = 2048, 8192


@dataclass(frozen=True)
class Head:
    """From hidden states (n, H) to logits / temperature (n, V): cap·tanh(scale·(h Wᵀ + b) / cap) / temperature."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0

    @property
    def linear_scale(self) -> float:
        """The factor of the product; with a soft cap the temperature comes after it."""
        return self.scale if self.soft_cap else self.scale / self.temperature

    def tiles(self) -> Iterator[tuple[slice, "Head"]]:
        """The head of a few columns of the vocabulary after the other."""
        for start in range(0, len(self.weight), TILE_COLUMNS):
            columns = slice(start, min(start + TILE_COLUMNS, len(self.weight)))
            bias = None if self.bias is None else self.bias[columns]
            yield columns, replace(self, weight=self.weight[columns], bias=bias)

    def project(self, hidden: Tensor, out: Tensor) -> None:
        """h Wᵀ + b into `out` (n, V)."""
        if self.weight.dtype == hidden.dtype == out.dtype:
            torch.mm(hidden, self.weight.T, out=out)
        else:
            for columns, tile in self.tiles():
                out[:, columns] = _product(hidden, tile.weight.T, out.dtype)
        if self.bias is not None:
            out.add_(self.bias)

    def finish(self, logits: Tensor) -> Tensor:
        """Scale, soft cap and temperature, in place."""
        if self.linear_scale != 1:
            logits.mul_(self.linear_scale)
        if self.soft_cap:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap / self.temperature)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the soft cap and what follows it, from finished logits; None where there is no cap."""
        if not self.soft_cap:
            return None
        tanh = logits * (self.temperature / self.soft_cap)
        return tanh.square_().neg_().add_(1).div_(self.temperature)

    def logits_at(self, hidden: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Finished logits of some entries, ids (n, k) -> (n, k), from k dot products a token."""
        rows = self.weight.index_select(0, ids.flatten()).to(dtype).unflatten(0, ids.shape)  # (n, k, H)
        logits = torch.bmm(hidden.to(dtype)[:, None], rows.transpose(1, 2)).squeeze(1)
        if self.bias is not None:
            logits.add_(self.bias[ids])
        return self.finish(logits)

    def pull_back(self, gradient: Tensor, out: Tensor) -> None:
        """gradient (n, V) of the scaled product to that of the hidden states, into `out` (n, H)."""
        if self.weight.dtype == gradient.dtype:
            torch.mm(gradient, self.weight, out=out)
        else:
            out.zero_()
            for columns, tile in self.tiles():
                out.add_(_product(gradient[:, columns], tile.weight, out.dtype))
        out.mul_(self.linear_scale)

    def add_gradient(self, gradient: Tensor, hidden: Tensor, out: Tensor) -> None:
        """Adds gradientᵀ·hidden to `out` (V, H)."""
        torch.addmm(out, gradient.T, hidden, alpha=self.linear_scale, out=out)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed in `dtype` whatever the operands are."""
    if right.is_cuda and right.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.to(right.dtype), right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


@dataclass(frozen=True)
class Teacher:
    """A head with its hidden states, or two whose logits are mixed: (1 - coef)·first + coef·second."""

    sides: tuple[tuple[Tensor, Head], ...]
    coef: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        hidden, head = self.sides[0]
        return logits_dtype(hidden, head.weight)

    def project(self, rows: slice, out: list[Tensor]) -> None:
        """The bare products, one for each side."""
        for (hidden, head), logits in zip(self.sides, out, strict=True):
            head.project(hidden[rows], out=logits)

    def finish(self, products: list[Tensor]) -> Tensor:
        """Logits from the products, in the first one's memory."""
        return self._mix([head.finish(x) for (_, head), x in zip(self.sides, products, strict=True)])

    def logits_at(self, rows: slice, ids: Tensor) -> Tensor:
        """Logits of some entries, ids (n, k) -> (n, k)."""
        return self._mix([head.logits_at(hidden[rows], ids, self.dtype) for hidden, head in self.sides])

    def logsumexp(self) -> Tensor:
        """Of all logits of each token, (N,); only a tile of tokens and columns is held."""
        hidden = self.sides[0][0]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            parts = [self._logsumexp(slice(i, i + TILE_TOKENS)) for i in range(0, len(hidden), TILE_TOKENS)]
        return torch.cat(parts) if parts else hidden.new_empty(0, dtype=self.dtype)

    def _logsumexp(self, rows: slice) -> Tensor:
        hidden = [hidden[rows] for hidden, _ in self.sides]
        columns = min(TILE_COLUMNS, len(self.sides[0][1].weight))
        buffers = [x.new_empty(len(x) * columns, dtype=self.dtype) for x in hidden]
        total = hidden[0].new_full((len(hidden[0]), 1), -math.inf, dtype=self.dtype)
        for tiles in zip(*(head.tiles() for _, head in self.sides), strict=True):
            products = []
            for x, buffer, (_, head) in zip(hidden, buffers, tiles, strict=True):
                products.append(buffer[: len(x) * len(head.weight)].view(len(x), -1))
                head.project(x, out=products[-1])
            logits = self.finish(products)
            total = torch.logaddexp(total, self._tile_logsumexp(logits))
        return total.squeeze(-1)

    def _tile_logsumexp(self, logits: Tensor) -> Tensor:
        """(n, 1) of a tile (n, c), which is overwritten."""
        if self.sides[0][1].bias is not None:  # it may forbid tokens
            return logits.logsumexp(-1, keepdim=True)
        # What log_softmax takes from any finite entry: half the time of logsumexp.
        entry = logits[:, :1].clone()
        torch.log_softmax(logits, dim=-1, out=logits)
        return entry.sub_(logits[:, :1])

    def _mix(self, logits: list[Tensor]) -> Tensor:
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


def logits_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float32, or float64 if anything is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


# Of the student's logits, the teacher's (or None), which tokens these are, and whether a gradient is wanted. Returns
# the value per token; overwrites the student's logits, with their gradient if it is wanted, and may the teacher's.
RowLoss = Callable[[Tensor, Tensor | None, slice, bool], Tensor]


@dataclass(frozen=True)
class Sweep:
    """One loss over all tokens.

    Attributes:
        head: the student's.
        loss: value and gradient of some rows of logits.
        chunk_tokens: tokens whose logits are held at a time; None: by memory.
        teacher: where the loss takes its logits.
        tensors: how many tensors of the size of the logits the loss works with, for the size of its blocks.
    """

    head: Head
    loss: RowLoss
    chunk_tokens: int | None
    teacher: Teacher | None = None
    tensors: int = 1

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
        self.head.finish(student)
        slope = self.head.slope(student) if wants_gradient else None
        values = self.loss(student, self.teacher.finish(teacher) if self.teacher else None, rows, wants_gradient)
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


def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, sweep: Sweep, weights: Tensor | None) -> Tensor:
    """Values (N,) of the sweep, differentiable in hidden (N, H), weight (V, H) and bias (V,).

    Always exact. The gradient of `weight` needs to know what each value is multiplied by later; the forward pass takes
    `weights` (default: all the same) for that, and the backward pass repeats the sweep if it was something else.
    """
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    values: Tensor = _TokenLosses.apply(hidden, weight, bias, sweep, weights)
    return values


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, sweep: Sweep, weights: Tensor | None
    ) -> Tensor:
        dtype = logits_dtype(hidden, weight)
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        ctx.sweep = sweep
        weights = torch.ones_like(hidden[:, 0], dtype=dtype) if weights is None else weights.detach().to(dtype)
        head_gradients = _head_gradients(ctx, weight, bias, dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            values = sweep.run(hidden, grad_hidden=grad_hidden, weights=weights, **head_gradients)
        # Not an input or output, and handed over to the first backward pass: scaled in place, never copied.
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
                ctx.sweep.run(hidden, weights=grad_values, **known)
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
