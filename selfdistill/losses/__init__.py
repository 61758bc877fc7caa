"""What is minimised: divergences between student and teacher per token, and how tokens are averaged into one number.

The names are looked up when they are used, so that the settings of a divergence can be checked without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdistill.losses.aggregation import MODES, aggregate, aggregation_normalizer, aggregation_weights
    from selfdistill.losses.divergence import Divergence
    from selfdistill.losses.head import Head
    from selfdistill.losses.materialised import (
        importance_weight,
        mix_logits,
        sampled_token_loss,
        support_divergence,
        token_divergence,
    )
    from selfdistill.losses.teacher_output import (
        FullDistribution,
        TeacherOutput,
        TopTokens,
        chunked_token_divergence,
        token_logps,
    )

__all__ = [
    "MODES",
    "Divergence",
    "FullDistribution",
    "Head",
    "TeacherOutput",
    "TopTokens",
    "aggregate",
    "aggregation_normalizer",
    "aggregation_weights",
    "chunked_token_divergence",
    "importance_weight",
    "mix_logits",
    "sampled_token_loss",
    "support_divergence",
    "token_divergence",
    "token_logps",
]
_MODULES = ("divergence", "aggregation", "head", "materialised", "teacher_output")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = import_module(f"selfdistill.losses.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
