"""What a served teacher says of tokens: the likeliest ones at each position, with their log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class TopTokens:
    """Log-probabilities in nats at T positions: of the token that was sampled, and of the K likeliest.

    Attributes:
        sampled_logps: (T,) of each sampled token; may be -inf.
        ids: (T, K) the K likeliest tokens, likeliest first. The sampled token need not be among them.
        logps: (T, K) of these, not renormalised.
    """

    sampled_logps: Float[Tensor, " T"]
    ids: Int[Tensor, "T K"]
    logps: Float[Tensor, "T K"]

    @classmethod
    def empty(cls, k: int) -> "TopTokens":
        """For no positions at all."""
        return cls(torch.zeros(0), torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k))

    @classmethod
    def concatenated(cls, rows: Sequence["TopTokens"], keep: Sequence[Bool[Tensor, " _"]]) -> "TopTokens":
        """The kept positions of several rows, one after the other.

        Args:
            rows: of any lengths and any K. To the widest K, narrower ones are padded with token 0 at -inf.
            keep: a mask for each row, as long as the row or longer; its end is then padding and not read.
        """
        width = max((row.ids.size(1) for row in rows), default=1)
        empty = cls.empty(width)
        parts = [(empty.sampled_logps, empty.ids, empty.logps)]
        for row, mask in zip(rows, keep, strict=True):
            mask, missing = mask[: len(row.sampled_logps)], (0, width - row.ids.size(1))
            ids, logps = pad(row.ids[mask], missing), pad(row.logps[mask], missing, value=-torch.inf)
            parts.append((row.sampled_logps[mask], ids, logps))
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def to(self, device: torch.device) -> "TopTokens":
        """The same numbers on another device."""
        return TopTokens(self.sampled_logps.to(device), self.ids.to(device), self.logps.to(device))
