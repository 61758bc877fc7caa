"""What is minimised: divergences between student and teacher per token, and how tokens are averaged into one number."""

from selfdistill.losses.aggregate import MODES, aggregate, aggregation_normalizer, aggregation_weights
from selfdistill.losses.chunked import chunked_support_divergence, chunked_token_divergence, chunked_token_logps
from selfdistill.losses.divergence import (
    importance_weight,
    mix_logits,
    sampled_token_loss,
    support_divergence,
    token_divergence,
)

__all__ = [
    "MODES",
    "aggregate",
    "aggregation_normalizer",
    "aggregation_weights",
    "chunked_support_divergence",
    "chunked_token_divergence",
    "chunked_token_logps",
    "importance_weight",
    "mix_logits",
    "sampled_token_loss",
    "support_divergence",
    "token_divergence",
]
