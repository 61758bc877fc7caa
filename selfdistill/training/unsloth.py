"""Unsloth as a loader: its model, adapter and engine, beneath TRL's trainer as TRL wrote it.

Unsloth changes transformers, PEFT and TRL when it is imported, so it comes before them.
"""

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from selfdistill.config.schema import Run
from selfdistill.errors import UserError, first_line
from selfdistill.machine.packages import CONFLICTS, Facts, installed
from selfdistill.models.loading import resolve

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

# What unsloth's adapter is put on where the configuration says all-linear.
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_OTHERWISE = "or write model.loader=transformers."


def import_unsloth() -> None:
    """Imports unsloth, before TRL is.

    Raises:
        UserError: it is not installed, there is no GPU, or its companions have versions that it does not work with.
    """
    if find_spec("unsloth") is None:
        raise UserError(f"model.loader=unsloth: it is not installed. pip install 'selfdistill[unsloth]', {_OTHERWISE}")
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"model.loader=unsloth needs a GPU, and torch sees none here. Choose one, {_OTHERWISE}")
    check_versions(Facts(installed(), gpu=True))
    if "trl" in sys.modules and "unsloth" not in sys.modules:
        raise UserError(
            "model.loader=unsloth: it has to be imported before TRL, which this process has imported. In a sweep write "
            f"model.loader=unsloth for all runs, on the command line, {_OTHERWISE}"
        )
    try:
        importlib.import_module("unsloth")
    except (ImportError, NotImplementedError, RuntimeError) as error:
        said = first_line(error)
        raise UserError(f"model.loader=unsloth: it cannot be imported: {said} Mend that, {_OTHERWISE}") from error
    put_trl_back()


def check_versions(facts: Facts) -> None:
    """Whether unsloth works with what is installed beside it.

    Raises:
        UserError: it does not.
    """
    for conflict in CONFLICTS:
        if conflict.fatal and "unsloth" in conflict.what and conflict.applies(facts):
            raise UserError(f"model.loader=unsloth: {conflict.consequence}. Write {conflict.advice}; {_OTHERWISE}")


def put_trl_back() -> None:
    """TRL's GRPO trainer and its arguments as TRL wrote them, where unsloth has put its own in their place.

    Unsloth's trainer computes its loss past the hooks that ours overrides, so that a teacher would say nothing. What it
    does for a shared engine stays, for it is in TRL's `VLLMGeneration`.
    """
    if "unsloth" not in sys.modules:
        return
    import trl.trainer

    for name, kind in (("grpo_config", "GRPOConfig"), ("grpo_trainer", "GRPOTrainer")):
        module = importlib.import_module(f"trl.trainer.{name}")
        if vars(module)[kind].__module__ != module.__name__:
            importlib.reload(module)
            for place in (trl, trl.trainer):
                setattr(place, kind, vars(module)[kind])


def loading_arguments(run: Run) -> dict[str, Any]:
    """What `FastLanguageModel.from_pretrained` is called with."""
    model, hardware = run.model, run.hardware
    arguments = {
        "model_name": resolve(model.name),
        "max_seq_length": model.max_seq_tokens,
        "load_in_4bit": model.load_in_4bit,
        "load_in_16bit": not model.load_in_4bit,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "use_gradient_checkpointing": "unsloth" if hardware.gradient_checkpointing else False,
        "random_state": run.seed,
        "fast_inference": hardware.vllm.mode == "colocate",
    }
    if model.dtype != "auto":
        import torch

        arguments["dtype"] = getattr(torch, model.dtype)
    if arguments["fast_inference"]:
        arguments |= {"gpu_memory_utilization": hardware.vllm.gpu_memory_utilization, "max_lora_rank": model.lora.r}
    return arguments


def adapter_arguments(run: Run) -> dict[str, Any]:
    """What `FastLanguageModel.get_peft_model` is called with, besides the model."""
    lora = run.model.lora
    return {
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _LINEAR if lora.target_modules == "all-linear" else lora.target_modules,
        "use_gradient_checkpointing": "unsloth" if run.hardware.gradient_checkpointing else False,
        "random_state": run.seed,
    }


def load(run: Run) -> tuple["PeftModel", "PreTrainedTokenizerBase"]:
    """The student with its adapter, and its tokenizer; with hardware.vllm.mode=colocate also its engine, which has the
    same weights and is handed the adapter.

    Raises:
        UserError: the model cannot be found or loaded.
    """
    from unsloth import FastLanguageModel

    try:
        model, tokenizer = FastLanguageModel.from_pretrained(**loading_arguments(run))
    except (OSError, ValueError, ImportError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"model.name={run.model.name} cannot be loaded by unsloth: {first_line(error)}") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return FastLanguageModel.get_peft_model(model, **adapter_arguments(run)), tokenizer
