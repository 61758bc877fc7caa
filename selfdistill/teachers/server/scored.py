"""What a served teacher says of a completion."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdistill.teachers.server.prompt_logprobs import Positions


@dataclass(frozen=True)
class Scored:
    """What the teacher says of one completion of T tokens.

    Attributes:
        logprobs: (T,) log-probability of each sampled token; may be -inf.
        top_ids: (T, k) the teacher's k likeliest tokens, likeliest first. The sampled token need not be among them.
        top_logprobs: (T, k) their log-probabilities; they are true ones, not renormalised.
    """

    logprobs: Float[Tensor, " T"]
    top_ids: Int[Tensor, "T k"]
    top_logprobs: Float[Tensor, "T k"]

    @classmethod
    def of(cls, positions: Positions) -> "Scored":
        """The same numbers as tensors, float32."""
        return cls(
            torch.from_numpy(positions.logprobs).float(),
            torch.from_numpy(positions.top_ids),
            torch.from_numpy(positions.top_logprobs).float(),
        )

    @classmethod
    def empty(cls, k: int) -> "Scored":
        """Of a completion without tokens."""
        return cls(torch.zeros(0), torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k))

    def pack(self) -> bytes:
        """As bytes, for a cache."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            logprobs=self.logprobs.numpy(),
            top_ids=self.top_ids.numpy().astype(np.int32),
            top_logprobs=self.top_logprobs.numpy(),
        )
        return buffer.getvalue()

    @classmethod
    def unpack(cls, stored: bytes) -> "Scored":
        """What `pack` made bytes of."""
        with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
            return cls(
                torch.from_numpy(arrays["logprobs"]),
                torch.from_numpy(arrays["top_ids"]).long(),
                torch.from_numpy(arrays["top_logprobs"]),
            )
