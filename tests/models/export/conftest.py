from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

from selfdistill.models.export.folder import new_folder
from selfdistill.models.export.verify import TransformersModel
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def base_folder(tmp_path):
    """A base model on disk, with larger matrices than at initialisation and no end token, so that answers vary."""
    folder = tmp_path / "base"
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
        model.get_input_embeddings().weight[tiny_tokenizer().eos_token_id] = 0.0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_adapter(model, adapter_name="default", scale=0.1, **settings):
    """The model with an adapter that has learned something: B is not zero."""
    torch.manual_seed(1)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    )
    model = get_peft_model(model, config, adapter_name=adapter_name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(0, scale)
            elif "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


def written(export, model, folder):
    """What `export.run` writes, not yet verified."""
    folder = Path(folder).absolute()
    with new_folder(folder) as partial:
        export.write(TransformersModel(model, tiny_tokenizer()), partial)
    return folder


def load_base(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options)


def four_bit(nested=False):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )


def wide_model():
    """A model whose layers bitsandbytes can pack: at least 64 wide, and a multiple of 32 high."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tiny_tokenizer()), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture
def base(base_folder):
    return load_base(base_folder)


@pytest.fixture
def adapted(base):
    return with_adapter(base)
