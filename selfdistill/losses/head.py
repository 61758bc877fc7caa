"""How hidden states become logits: the output head, and products with it that never widen the whole of it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Columns of the vocabulary taken at a time where a head is widened or only a sum over the vocabulary is wanted.
TILE_COLUMNS = 8192
# Tokens that `entropy_sum` projects at a time.
ENTROPY_CHUNK_TOKENS = 16


@dataclass(frozen=True)
class Head:
    """From hidden states h (N, H) to logits (N, V): soft_cap·tanh(scale·(h Wᵀ + b) / soft_cap) / temperature."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0

    @property
    def linear_scale(self) -> float:
        """The factor of the product; with a soft cap the temperature comes after it."""
        return self.scale if self.soft_cap else self.scale / self.temperature

    def at(self, temperature: float) -> "Head":
        """The same head, its logits divided by a temperature."""
        return replace(self, temperature=float(temperature))

    def detached(self) -> "Head":
        """Without gradient, and with the numbers as they are now: a parameter's data may be exchanged later."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def copied(self) -> "Head":
        """In memory of its own."""
        return replace(self, weight=self.weight.clone(), bias=None if self.bias is None else self.bias.clone())

    def narrowed(self, size: int) -> "Head":
        """Of the first `size` tokens: models of one family pad a shared vocabulary to different sizes."""
        return self if size == len(self.weight) else self._columns(slice(0, size))

    def as_autocast(self) -> "Head":
        """With the weight as a linear layer would take it under autocast on a GPU."""
        return replace(self, weight=as_autocast(self.weight))

    def tiles(self) -> Iterator[tuple[slice, "Head"]]:
        """The head of a few columns of the vocabulary after the other."""
        for start in range(0, len(self.weight), TILE_COLUMNS):
            columns = slice(start, min(start + TILE_COLUMNS, len(self.weight)))
            yield columns, self._columns(columns)

    def _columns(self, columns: slice) -> "Head":
        bias = None if self.bias is None else self.bias[columns]
        return replace(self, weight=self.weight[columns], bias=bias)

    def logits(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """Finished logits without gradient, in float32, or float64 where anything is."""
        hidden, head = hidden.detach(), self.detached()
        out = hidden.new_empty(len(hidden), len(self.weight), dtype=logits_dtype(hidden, self.weight))
        head.project(hidden, out=out)
        return head.finish_(out)

    def project(self, hidden: Tensor, out: Tensor) -> None:
        """The bare product h Wᵀ + b into `out` (N, V)."""
        if self.weight.dtype == hidden.dtype == out.dtype:
            torch.mm(hidden, self.weight.T, out=out)
        else:
            for columns, tile in self.tiles():
                out[:, columns] = _product(hidden, tile.weight.T, out.dtype)
        if self.bias is not None:
            out.add_(self.bias)

    def finish_(self, logits: Tensor) -> Tensor:
        """Scale, soft cap and temperature of bare products, in place."""
        return finish_(logits, self.linear_scale, self.soft_cap, self.temperature)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the soft cap and what follows it, from finished logits; None where there is no cap."""
        if not self.soft_cap:
            return None
        tanh = logits * (self.temperature / self.soft_cap)
        return tanh.square_().neg_().add_(1).div_(self.temperature)

    def logits_at(
        self, hidden: Float[Tensor, "N H"], ids: Int[Tensor, "N K"], dtype: torch.dtype
    ) -> Float[Tensor, "N K"]:
        """Finished logits of some entries, from K dot products a token."""
        rows = self.weight.index_select(0, ids.flatten()).to(dtype).unflatten(0, ids.shape)  # (N, K, H)
        logits = torch.bmm(hidden.to(dtype)[:, None], rows.transpose(1, 2)).squeeze(1)
        if self.bias is not None:
            logits.add_(self.bias[ids])
        return self.finish_(logits)

    def pull_back(self, gradient: Tensor, out: Tensor) -> None:
        """The gradient (N, V) of the scaled product to that of the hidden states, into `out` (N, H)."""
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


def finish_(logits: Tensor, linear_scale: float, soft_cap: float | None, temperature: float = 1.0) -> Tensor:
    """soft_cap·tanh(linear_scale·x / soft_cap) / temperature of bare products x, in place.

    Without a soft cap the temperature belongs into the scale.
    """
    if linear_scale != 1:
        logits.mul_(linear_scale)
    if soft_cap:
        logits.div_(soft_cap).tanh_().mul_(soft_cap / temperature)
    return logits


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed in `dtype` whatever the operands are."""
    if right.is_cuda and right.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.to(right.dtype), right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def logits_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float32, or float64 if anything is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def as_autocast(tensor: Tensor) -> Tensor:
    """What a linear layer would do on a GPU: float32 products there would take many times as long."""
    on = tensor.is_cuda and torch.is_autocast_enabled("cuda")
    return tensor.to(torch.get_autocast_dtype("cuda")) if on else tensor


@torch.no_grad()
def entropy_sum(hidden: Float[Tensor, "N H"], head: Head) -> float:
    """Sum of the entropies, in nats, of the predictions from some hidden states; a few at a time keep memory small."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk in hidden.split(ENTROPY_CHUNK_TOKENS):
        total += torch.special.entr(torch.softmax(head.logits(chunk), dim=-1)).sum()
    return total.item()
