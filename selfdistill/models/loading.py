"""Loads models with transformers, optionally in 4 bit or with a saved adapter, and the embedded model."""

import inspect
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdistill.errors import UserError, first_line

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"


def resolve(name: str) -> str:
    """The folder or hub name that `name` stands for: `embedded` is the model inside this package."""
    return str(resources.files("selfdistill.models") / EMBEDDED) if name == EMBEDDED else name


def load_model(
    *,
    name: str,
    tuning: str | None = None,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    adapter_path: str | None = None,
    key: str = "model.name",
) -> tuple["PreTrainedModel | PeftModel", "PreTrainedTokenizerBase"]:
    """A causal language model in training precision, and its tokenizer.

    The model has no adapter yet (`lora_config` describes it and the trainer adds it), except where `adapter_path` names
    one to be trained further.

    Args:
        tuning: `full` if all weights are going to be trained; `dtype=auto` then means float32, whatever the checkpoint
            has, for 16 bits round most updates away. Otherwise it is the checkpoint's own.
        key: what a message to the user calls `name`.

    Raises:
        UserError: the model cannot be found or loaded; says what was looked for.
    """
    path = resolve(name)
    if Path(path).is_dir() and not any((Path(path) / f).exists() for f in ("config.json", "adapter_config.json")):
        raise UserError(
            f"{key}={name}: this folder holds no model, for it has no config.json. "
            "Write a folder with config.json and weights, or a hub name."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    common = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    if dtype == "auto" and tuning == "full":
        dtype = "float32"
    weights = dtype if dtype == "auto" else getattr(torch, dtype)
    quantization = None
    if load_in_4bit:
        compute = torch.bfloat16 if dtype == "auto" else weights
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    how = {"dtype": weights, "attn_implementation": attn_implementation, "quantization_config": quantization}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **common)
        model: Any = AutoModelForCausalLM.from_pretrained(path, **how, **common)
    except (OSError, ValueError, ImportError) as error:
        hint = "a folder with config.json and weights, or a hub name that this machine can reach"
        if local_files_only:
            hint += "; with model.local_files_only=true it must be in the local cache already"
        raise UserError(f"{key}={name} cannot be loaded: {first_line(error)} Write {hint}.") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if adapter_path:
        from peft import PeftModel

        if not (Path(adapter_path) / "adapter_config.json").exists():
            raise UserError(f"model.adapter_path={adapter_path}: there is no adapter_config.json in that folder.")
        model = PeftModel.from_pretrained(model, adapter_path, is_trainable=True)
    return model, tokenizer


def load_configured(group: Mapping[str, Any]) -> tuple["PreTrainedModel | PeftModel", "PreTrainedTokenizerBase"]:
    """`load_model` with the configuration group `model`, apart from the keys that only others read."""
    accepted = inspect.signature(load_model).parameters
    return load_model(**{key: value for key, value in group.items() if key in accepted})


def lora_config(*, r: int, alpha: int, dropout: float, target_modules: str | list[str]) -> "LoraConfig":
    """PEFT's description of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, bias="none", task_type="CAUSAL_LM"
    )
