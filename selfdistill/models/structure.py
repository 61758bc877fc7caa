"""Access to the parts of a causal language model that the losses need: its hidden states and its output head."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PretrainedConfig

from selfdistill.losses.head import Head


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
    """The factor and the soft cap that some architectures apply to their logits.

    Granite divides them, Cohere multiplies them, Gemma caps them.
    """
    scale = 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale = 1.0 / divisor
    elif factor := getattr(config, "logit_scale", None):
        scale = float(factor)
    return scale, getattr(config, "final_logit_softcapping", None)


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


def completion_hidden(model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (B, T, H) that predict the completion's tokens.

    Args:
        prompt_ids, prompt_mask: (B, P), padded on the left; columns that are padding in every row are left out.
        ids, mask: the completion's (B, T), padded on the right.
    """
    start = int(prompt_mask.argmax(dim=1).min())
    prompt_ids, prompt_mask = prompt_ids[:, start:], prompt_mask[:, start:]
    with captured_hidden(model) as collected:
        model(
            input_ids=torch.cat([prompt_ids, ids], dim=1),
            attention_mask=torch.cat([prompt_mask, mask], dim=1),
            use_cache=False,
            **limited_logits(model, 1),  # the loss applies the head itself, to the tokens that count
        )
    return aligned(collected[-1], prompt_ids.size(1), ids.size(1))


def aligned(hidden: Tensor, prompt_tokens: int, completion_tokens: int) -> Tensor:
    """The states at positions P-1 … P+T-2: the state before a token is the one that predicts it."""
    return hidden[:, prompt_tokens - 1 : prompt_tokens - 1 + completion_tokens]


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
