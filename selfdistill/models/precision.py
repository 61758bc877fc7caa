"""Which precision the trained parameters have, and what comes of it."""

import logging
from collections import Counter
from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn

from selfdistill.errors import UserError

log = logging.getLogger(__name__)


def adapter_weights(model: object) -> dict[str, Tensor]:
    """A copy of the parameters that a PEFT model trains; empty for any other model, or a name."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def restore_adapter(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Gives the adapter of a quantised model the precision back that TRL takes from it: float32.

    TRL rounds it to bfloat16, which does not resolve the updates of the usual learning rates. To be called before the
    optimizer is made and the model is wrapped.

    Args:
        start: what `adapter_weights` gave before TRL had the model.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_floating_point():
            p.data = start[name].to(p.device) if name in start else p.data.float()


def check_precision(model: nn.Module) -> None:
    """Says so where parameters are trained in 16 bits.

    Raises:
        UserError: they are float16, in which Adam's second moments underflow and gradients cannot be unscaled.
    """
    trained = precisions(model, trained=True)
    instead = (
        "Load the model in float32 (model.dtype=auto or float32; from Python dtype=torch.float32, or for a model given "
        'by name GRPOConfig(model_init_kwargs={"dtype": "float32"})), or train an adapter (model.tuning=lora)'
    )
    if torch.float16 in trained:
        raise UserError(f"The trained parameters are float16, in which an optimizer cannot work. {instead}.")
    if torch.bfloat16 in trained:
        log.warning(
            "%s of the trained parameters are bfloat16, where an update below 1/256 of a weight is rounded away: nine "
            "of ten are at the learning rates of full training. %s.",
            f"{trained[torch.bfloat16]:,}",
            instead,
        )


def precisions(model: nn.Module, *, trained: bool) -> Counter[torch.dtype]:
    """How many parameters there are of each precision.

    Args:
        trained: of those that are trained, or of the others.
    """
    counts: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        if p.requires_grad == trained:
            counts[p.dtype] += p.numel()
    return counts


def precision_line(model: nn.Module) -> str:
    """For example "float32", or "bfloat16, trained in float32" where an adapter has another precision than its base."""
    frozen, trained = (precisions(model, trained=which) for which in (False, True))
    names = [_name(counts.most_common(1)[0][0]) for counts in (frozen, trained) if counts]
    return ", trained in ".join(dict.fromkeys(names))


def _name(dtype: torch.dtype) -> str:
    return "4 or 8 bit" if not dtype.is_floating_point else str(dtype).removeprefix("torch.")
