import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

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


def load_base(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options)


@pytest.fixture
def base(base_folder):
    return load_base(base_folder)


@pytest.fixture
def adapted(base):
    return with_adapter(base)
