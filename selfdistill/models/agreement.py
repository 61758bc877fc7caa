"""Whether what the losses compute of a model is what the model itself says: found out on a few tokens, before training.

Architectures differ in what they do to their logits behind the head, and in what padding in front of a row does to it.
Both would only show as a loss that is a little wrong. So a model is asked, and where no agreement can be had it is
refused.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase

from selfdistill.errors import UserError
from selfdistill.models.structure import captured_hidden, evaluating, head_of, inner_model

TEXT = "the quick brown fox jumps over the lazy dog and runs home again"
ROW_TOKENS = 16
# The shorter of two rows; it is padded by the difference.
SHORT_TOKENS = 9
# The largest relative distance of two ways to compute the same logits. In float32 it comes from the order of additions,
# and the worst token counts. With 16 bits the noise grows with every layer and a mixture of experts may choose another
# expert, so the median counts.
TOLERANCE, TOLERANCE_16_BIT = 1e-2, 1e-1
# From here on it is tried whether positions make it smaller.
NOISE = 1e-3

# TRL's pass: of a model, ids (B, S), their mask and a number of last tokens, with log-probabilities first.
LogProbs = Callable[[nn.Module, Tensor, Tensor, int], tuple[Tensor, ...]]


def can_be_asked(model: nn.Module) -> bool:
    """Whether this process has the model's weights: sharded ones, or those still to come from another, it has not."""
    return all(p.numel() and not p.is_meta for p in model.parameters())


def probe(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "1 S"]:
    """A short row of real tokens."""
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    repeated = (ids * ROW_TOKENS)[:ROW_TOKENS]
    return torch.tensor([repeated], device=inner_model(model).get_input_embeddings().weight.device)


def padded(ids: Int[Tensor, "1 S"], pad_id: int) -> tuple[Int[Tensor, "2 S"], Int[Tensor, "2 S"]]:
    """The row and its last `SHORT_TOKENS` tokens alone, padded on the left; and the mask."""
    padding = ids.size(1) - SHORT_TOKENS
    short = torch.cat([torch.full_like(ids[:, :padding], pad_id), ids[:, padding:]], dim=1)
    mask = torch.ones_like(torch.cat([ids, short]))
    mask[1, :padding] = 0
    return torch.cat([ids, short]), mask


def check_head(model: nn.Module, tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Compares the head's product with the captured hidden states with the model's own logits.

    Args:
        whose: what a message to the user calls the model.

    Raises:
        UserError: they differ, so that a divergence would compare something else than the model's predictions.
    """
    ids = probe(model, tokenizer)
    with evaluating(model), captured_hidden(model) as captured:
        own = _logits(model, ids, torch.ones_like(ids))
        head, hidden = head_of(model), captured[-1][0, -ids.size(1) :]
        fits = head.weight.shape == (own.size(-1), hidden.size(-1))
        if fits and logits_agree(model, head.logits(hidden), own):
            return
    raise _refused(
        model,
        whose,
        "its logits are not the product of its output head and its last hidden states in a way that is known here, so "
        "that a divergence or a cross-entropy would be of other predictions",
        "Train it with a reward alone",
    )


def check_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Compares a row behind padding with the row alone; a model that counts padding as positions is told them.

    Completions are sampled behind prompts that are padded on the left, and the policy gradient is computed so.

    Args:
        whose: what a message to the user calls the model.

    Raises:
        UserError: the row's logits depend on its padding.
    """
    ids = probe(model, tokenizer)
    rows, mask = padded(ids, tokenizer.pad_token_id)
    with evaluating(model):
        alone = _logits(model, *_alone(ids))

        def error() -> float:
            return disagreement(model, _logits(model, rows, mask)[-SHORT_TOKENS:], alone)

        found = error()
        if not found <= NOISE and "position_ids" in inspect.signature(_decoder(model).forward).parameters:
            hook = tell_positions(model)
            mended = error()
            if found / 2 <= mended:
                hook.remove()
            else:
                found = mended
    if not found <= _tolerance(model):  # which nothing is that is not a number
        raise _refused(
            model,
            whose,
            "it does not leave out the padding in front of a prompt, so that a row would depend on the rows beside it",
        )


def check_log_probs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, log_probs: LogProbs, temperature: float, whose: str
) -> None:
    """Compares the log-probabilities of TRL's pass with those of the model's own logits.

    Args:
        log_probs: TRL's pass.
        temperature: by which it divides the logits.
        whose: what a message to the user calls the model.

    Raises:
        UserError: they differ, so that the policy gradient would be another policy's.
    """
    ids = probe(model, tokenizer)
    rows, mask = padded(ids, tokenizer.pad_token_id)
    short, ones = _alone(ids)
    with evaluating(model):
        theirs = log_probs(model, rows, mask, SHORT_TOKENS - 1)[0][-1]
        own = torch.log_softmax(_logits(model, short, ones).float() / temperature, dim=-1)
    own = own[:-1].gather(1, short[0, 1:, None]).squeeze(1)
    if not disagreement(model, theirs[None], own[None]) <= _tolerance(model):
        raise _refused(
            model,
            whose,
            "TRL computes other log-probabilities than its own, so that a policy gradient would be another policy's",
            "Train it with a teacher alone (policy_weight=0, beta=0)",
        )


def _refused(model: nn.Module, whose: str, because: str, *instead: str) -> UserError:
    name = type(inner_model(model)).__name__
    todo = ", or ".join([*instead, "take a model of another architecture"])
    return UserError(f"{whose} is a {name}: {because}. {todo[0].upper()}{todo[1:]}.")


def tell_positions(model: nn.Module) -> RemovableHandle:
    """From now on a pass without positions gets those that follow from its attention mask."""
    return _decoder(model).register_forward_pre_hook(_with_positions, with_kwargs=True)


def is_told_positions(model: nn.Module) -> bool:
    """Whether `tell_positions` is at work."""
    return _with_positions in _decoder(model)._forward_pre_hooks.values()


def _with_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and isinstance(mask, Tensor) and mask.dim() == 2:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        kwargs = {**kwargs, "position_ids": positions[:, -tokens.size(1) :]}  # those before are in the cache
    return args, kwargs


def disagreement(model: nn.Module, ours: Float[Tensor, "T V"], own: Float[Tensor, "T V"]) -> float:
    """The relative distance of two ways to compute a model's logits, as it is judged at the model's precision."""
    ours, own = ours.float(), own.float()
    errors = (ours - own).norm(dim=-1) / own.norm(dim=-1)
    return float(errors.median() if _is_rough(model) else errors.max())


def logits_agree(model: nn.Module, ours: Float[Tensor, "T V"], own: Float[Tensor, "T V"]) -> bool:
    """Whether two ways to compute a model's logits give the same, within its precision."""
    return ours.shape == own.shape and disagreement(model, ours, own) <= _tolerance(model)


def _logits(model: nn.Module, ids: Int[Tensor, "B S"], mask: Int[Tensor, "B S"]) -> Float[Tensor, "S V"]:
    """The model's own logits of the last row's tokens, without those of a learned prompt."""
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[-1, -ids.size(1) :]


def _alone(ids: Int[Tensor, "1 S"]) -> tuple[Int[Tensor, "1 T"], Int[Tensor, "1 T"]]:
    """The shorter row of `padded` without its padding, and its mask."""
    short = ids[:, -SHORT_TOKENS:]
    return short, torch.ones_like(short)


def _decoder(model: nn.Module) -> nn.Module:
    decoder: nn.Module = inner_model(model).get_decoder()
    return decoder


def _tolerance(model: nn.Module) -> float:
    return TOLERANCE_16_BIT if _is_rough(model) else TOLERANCE


def _is_rough(model: nn.Module) -> bool:
    """Whether any of it is computed with 16 bits or less."""
    precise = (torch.float32, torch.float64)
    return torch.is_autocast_enabled(next(model.parameters()).device.type) or any(
        p.dtype not in precise for p in model.parameters()
    )
