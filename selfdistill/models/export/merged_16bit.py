"""One ordinary 16-bit model: base and adapter merged in float32, layer by layer, and rounded once."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from selfdistill.errors import UserError
from selfdistill.models.export import ExportError
from selfdistill.models.export.folder import base_location, new_folder, write_card, write_companions
from selfdistill.models.generation import base_model


def export_merged_16bit(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path, dtype: str = "bfloat16"
) -> Path:
    """Write the model, adapters merged, 4-bit weights dequantised, to `folder` in bfloat16 or float16.

    The model in memory is not changed. Takes, beside it, the main memory of the 16-bit weights.

    Raises:
        UserError: the adapter is of a kind that cannot be merged.
        ExportError: a merged weight is not finite in `dtype`.
    """
    base = base_model(model)
    target = {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    with new_folder(folder) as partial:
        tensors = dict(merged_tensors(model, target))
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ExportError(f"the merged weight {name} is not finite in {dtype}; nothing was written")
        config = copy.deepcopy(base.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.use_cache = True
        config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False) and _head_is_tied(base, tensors)
        config._attn_implementation = "eager"  # the skeleton never computes; this one needs no extra package
        with torch.device("meta"):
            skeleton = type(base)(config)
        skeleton.load_state_dict(tensors, strict=True, assign=True)
        skeleton.tie_weights()
        skeleton.save_pretrained(partial)
        write_companions(model, tokenizer, partial)
        usage = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'
        )
        notes = [f"All weights in {dtype}; nothing else is needed to load it."]
        if getattr(base.config, "quantization_config", None) is not None:
            notes.append("Trained on the base quantised to 4 bit: these are the dequantised weights plus the adapter.")
        name = base_location(model) if base.name_or_path else "trained from scratch"
        write_card(partial, title=f"Merged model, {dtype}", base=name, usage=usage, notes=notes, library="transformers")
    return Path(folder).absolute()


def merged_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and value, on the CPU, of every weight the merged model consists of; floating ones in `dtype`."""
    with torch.no_grad():
        for name, tensor in _tensors(base_model(model), ""):
            yield name, tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


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


def _merged_layer(layer: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    base = layer.get_base_layer()
    if not _is_quantised(base.weight):
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


def _is_quantised(weight: Tensor) -> bool:
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def _dequantised(module: nn.Module, parameter: Tensor) -> Tensor:
    return dequantize_bnb_weight(parameter, getattr(module, "state", None)) if _is_quantised(parameter) else parameter


def _head_is_tied(base: Any, tensors: dict[str, Tensor]) -> bool:
    """False where an adapter on the embedding or the head has made two matrices out of one."""
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    names = {id(module): name for name, module in base.named_modules()}
    weights = [tensors.get(f"{names.get(id(module))}.weight") for module in ends]
    return weights[0] is None or weights[1] is None or torch.equal(weights[0], weights[1])
