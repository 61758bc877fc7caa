"""Merges the weights of base and adapter into those of one ordinary model."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfdistill.errors import UserError
from selfdistill.models.export import ExportError
from selfdistill.models.export.folder import write_companions
from selfdistill.models.structure import keep_unpacked

if TYPE_CHECKING:
    from selfdistill.models.export.verify import TransformersModel


def merged_tensors(base: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and value, on the CPU, of every weight of the base with its adapter merged in; floating ones in `dtype`.

    Raises:
        UserError: the adapter is of a kind that cannot be merged.
        ExportError: a weight is not finite.
    """
    keep_unpacked(base)
    with torch.no_grad():
        for name, tensor in _tensors(base, ""):
            yield name, tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


def write_merged(trained: "TransformersModel", folder: Path, dtype: torch.dtype) -> None:
    """Writes one ordinary model with its tokenizer: adapters merged, 4-bit weights dequantised, all in `dtype`.

    It takes the main memory of these weights beside the model.

    Raises:
        UserError: the adapter is of a kind that cannot be merged.
        ExportError: a merged weight is not finite in `dtype`.
    """
    base, name = trained.base, str(dtype).removeprefix("torch.")
    trained.tell(f"merging and writing {base.num_parameters() / 1e6:,.0f} million weights in {name}")
    tensors = dict(merged_tensors(base, dtype))
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ExportError(f"the merged weight {key} is not finite in {name}; nothing was written")
    config = copy.deepcopy(base.config)
    if trained.quantization is not None:
        del config.quantization_config
    config.use_cache = True
    config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False) and head_is_tied(base, tensors)
    config._attn_implementation = "eager"  # the skeleton never computes; this one needs no extra package
    with torch.device("meta"):
        skeleton = type(base)(config)
    skeleton.load_state_dict(tensors, strict=True, assign=True)
    skeleton.tie_weights()
    skeleton.save_pretrained(folder)
    write_companions(trained, folder)


def _tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module, BaseTunerLayer):
        yield from _merged_layer(module, prefix)
    elif isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters[0]
        yield from _tensors(module.modules_to_save[active], prefix)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise UserError(
            f"{prefix[:-1]} is trained by {type(module).__name__}, which cannot be merged: write export=lora, "
            "or leave such tokens out of model.lora."
        )
    else:
        for name, parameter in module.named_parameters(recurse=False):
            yield prefix + name, _dequantised(module, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer
        for name, child in module.named_children():
            yield from _tensors(child, f"{prefix}{name}.")


def _merged_layer(layer: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:  # of PEFT, whose layers share no such type
    base = layer.get_base_layer()
    if not get_bnb_param_type(base.weight):
        # PEFT's own merge, on a copy in float32: adding in 16 bit would round twice and could not be undone exactly.
        merged = copy.deepcopy(layer).float()
        try:
            merged.merge(safe_merge=True)
        except ValueError as error:
            raise ExportError(f"{prefix[:-1]}: {error}; nothing was written") from error
        yield from _tensors(merged.get_base_layer(), prefix)
        return
    # Merging into quantised weights would quantise the sum again, so the sum is taken here.
    weight = _dequantised(base, base.weight).float()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            raise UserError(
                f"{prefix[:-1]}: a DoRA or LoRA with bias cannot be merged out of 4 bit: write export=lora, "
                "or train with model.load_in_4bit=false."
            )
        if adapter in layer.lora_A:
            weight = weight + layer.get_delta_weight(adapter).float()
    yield prefix + "weight", weight
    if base.bias is not None:
        yield prefix + "bias", base.bias


def _dequantised(module: nn.Module, parameter: nn.Parameter) -> Tensor:
    quantised = get_bnb_param_type(parameter)
    return dequantize_bnb_weight(parameter, getattr(module, "state", None)) if quantised else parameter


def head_is_tied(base: PreTrainedModel, tensors: dict[str, Tensor]) -> bool:
    """False where an adapter on the embedding or the head has made two matrices out of one."""
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    names = {id(module): name for name, module in base.named_modules()}
    weights = [tensors.get(f"{names.get(id(module))}.weight") for module in ends]
    return weights[0] is None or weights[1] is None or torch.equal(weights[0], weights[1])
