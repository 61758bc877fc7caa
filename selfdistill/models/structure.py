"""Access to the parts of a causal language model that the losses need: its hidden states and its output head."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PretrainedConfig

from selfdistill.losses.head import Head
from selfdistill.models.row_groups import in_row_order, row_groups

# Where configurations keep what the logits are multiplied by: Granite and MiniCPM3 divide by the first; Cohere,
# Falcon-H1 and Muse Glimmer multiply by theirs.
FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
# The `model_type` of HyperCLOVA X, which multiplies by what has the same name in Granite.
MULTIPLIED_BY_LOGITS_SCALING = ("hyperclovax",)
# And their soft caps: Gemma's, RecurrentGemma's and xLSTM's.
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def inner_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT or distributed wrapper, adapters still at work; any other model itself."""
    while isinstance(inside := getattr(model, "module", None), nn.Module):
        model = inside
    return model.get_base_model() if isinstance(model, PeftModel) else model


def head_of(model: nn.Module) -> Head:
    """The output head; a LoRA adapter on the head is folded into its weight, with gradient."""
    inner = inner_model(model)
    module = inner.get_output_embeddings()
    weight = module.weight
    if hasattr(module, "get_delta_weight") and not module.disable_adapters:  # PEFT's layers share no type that has it
        weight = weight + sum(module.get_delta_weight(name) for name in module.active_adapters)
    return Head(weight, getattr(module, "bias", None), *scale_and_soft_cap(inner.config.get_text_config()))


def scale_and_soft_cap(config: PretrainedConfig) -> tuple[float, float | None]:
    """The factor and the soft cap that some architectures apply to their logits, under the names that they give them.

    Whether nothing is missing here is found out by comparison with the model's own logits, before a run begins.
    """
    scale = 1.0
    for name in FACTORS:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value:  # MPT's may be a text, which its model does not read
            divides = name == "logits_scaling" and config.model_type not in MULTIPLIED_BY_LOGITS_SCALING
            scale *= 1 / value if divides else value
    return scale, next((cap for name in SOFT_CAPS if (cap := getattr(config, name, None))), None)


@contextmanager
def captured_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the backbone's last hidden state (B, T, H) of every forward pass inside, with its graph.

    A hook, so that the pass may go through any wrapper: distributed training sees an ordinary call.
    """
    collected: list[Tensor] = []

    def collect(module: nn.Module, inputs: object, output: Any) -> None:
        collected.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    hook = inner_model(model).get_decoder().register_forward_hook(collect)
    try:
        yield collected
    finally:
        hook.remove()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradient inside; every module's own mode is restored. A plain callable has no mode."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if modes:
            keep_unpacked(model)
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def keep_unpacked(model: nn.Module) -> None:
    """Forbids bitsandbytes to pack 4-bit weights, for good, and unpacks those that are packed already.

    On a CPU with AVX512-BF16, bitsandbytes rearranges them for a faster kernel in the first forward pass in evaluation
    mode. That kernel has no gradient, so that later training would silently lose it, and whatever else reads packed
    weights (an export, a state dict) gets other numbers.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")  # an optional package, and a model that needs it has imported it
    if bitsandbytes is None:
        return
    for layer in model.modules():
        if not isinstance(layer, bitsandbytes.nn.Linear4bit):
            continue
        layer.support_avx512bf16_for_cpu = False
        state = layer.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            # bitsandbytes restores the scales wrongly, or rounds them once more; they are kept as the kernel used them.
            scales, state.original_nested = state.absmax.T.flatten().float(), False
            unpack = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse
            layer.weight.data, state = unpack(layer.weight.data, state)
            state.absmax = scales


def completion_hidden(
    model: nn.Module,
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Int[Tensor, "B P"],
    ids: Int[Tensor, "B T"],
    mask: Int[Tensor, "B T"],
) -> Float[Tensor, "B T H"]:
    """Hidden states that predict the completion's tokens; those of padding have no meaning.

    Prompt and completion go through the model side by side with all padding behind them, where a causal model never
    looks. So each row's states are what it would have alone, whatever the architecture makes of padding in front, and
    no column is computed that is padding in every row. Rows of very different lengths go through it in several passes.

    Args:
        prompt_ids, prompt_mask: padded on the left.
        ids, mask: the completion's, padded on the right.
    """
    groups = row_groups(torch.cat([prompt_mask, mask], dim=1), mask[:, :0])
    parts = [_packed_hidden(model, *(x[group.rows] for x in (prompt_ids, prompt_mask, ids, mask))) for group in groups]
    return parts[0] if len(parts) == 1 else in_row_order(parts, groups, ids.size(1))


def _packed_hidden(
    model: nn.Module,
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Int[Tensor, "B P"],
    ids: Int[Tensor, "B T"],
    mask: Int[Tensor, "B T"],
) -> Float[Tensor, "B T H"]:
    """`completion_hidden` of one pass."""
    tokens, valid = torch.cat([prompt_ids, ids], dim=1), torch.cat([prompt_mask, mask], dim=1)
    width = int(valid.sum(dim=1).max())
    order = valid.argsort(dim=1, descending=True, stable=True)[:, :width]
    with captured_hidden(model) as collected:
        model(
            input_ids=tokens.gather(1, order),
            attention_mask=valid.gather(1, order),
            use_cache=False,
            **limited_logits(model, 1),  # the loss applies the head itself, to the tokens that count
        )
    hidden = collected[-1][:, -width:]  # a learned prompt, as of prompt tuning, stands before
    # The state before a token is the one that predicts it.
    before = prompt_mask.sum(dim=1, keepdim=True) - 1 + torch.arange(ids.size(1), device=ids.device)
    return hidden.gather(1, before.clamp(max=width - 1)[:, :, None].expand(-1, -1, hidden.size(2)))


def aligned(hidden: Float[Tensor, "B S H"], completion_tokens: int) -> Float[Tensor, "B T H"]:
    """The states that predict the last `completion_tokens` of a pass: the one before a token is the one that does."""
    return hidden[:, -completion_tokens - 1 : -1]


def has_dropout(model: nn.Module) -> bool:
    """Whether the model computes something else in training mode than in evaluation mode."""
    config = inner_model(model).config.get_text_config()
    functional = any(getattr(config, name, 0.0) for name in ("attention_dropout", "hidden_dropout", "residual_dropout"))
    return functional or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def is_reference(model: nn.Module) -> bool:
    """Whether a PEFT model runs as its own reference: adapters off, or TRL's frozen copy of the adapter on."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return any(layer.disable_adapters or layer.active_adapters == ["ref"] for layer in layers)


def limited_logits(model: nn.Module, positions: int) -> dict[str, int]:
    """The argument that makes a forward pass compute logits for the last positions only, where the model takes it."""
    # Asked of the class: the instance's forward may have been replaced by one that hides its arguments.
    takes_it = "logits_to_keep" in inspect.signature(type(inner_model(model)).forward).parameters
    return {"logits_to_keep": positions} if takes_it else {}
