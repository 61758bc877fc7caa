"""Trained models become files of llama.cpp, which answers as they do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from selfdistill import export
from selfdistill.models.export import ExportError
from selfdistill.models.export.gguf import MODEL, MODELFILE, Gguf
from selfdistill.models.export.merged_4bit import Merged4bit
from selfdistill.models.export.verify import TransformersModel
from tests.command import command
from tests.gguf.conftest import FOLDER
from tests.tiny import tiny_tokenizer

PROMPTS = [[{"role": "user", "content": text}] for text in ("shout hi", "reverse abc", "add 3 and 4", "what now?")]
COMMON: dict[str, Any] = {
    "vocab_size": len(tiny_tokenizer()), "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
    "eos_token_id": 2, "bos_token_id": None,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**COMMON, head_dim=64)),
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**COMMON, head_dim=64)),
    "gemma": (Gemma3ForCausalLM, lambda: Gemma3TextConfig(**COMMON, head_dim=64, query_pre_attn_scalar=64)),
    "lfm2": (
        Lfm2ForCausalLM,
        lambda: Lfm2Config(
            **COMMON, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, block_multiple_of=256
        ),
    ),
}


def verification(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "verification.json").read_text())  # type: ignore[no-any-return]


def adapted(architecture: str) -> Any:
    """A model of random weights, wide enough for blocks of 256, with an adapter that does something."""
    kind, config = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = kind(config()).eval()
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_answers_as_the_trained_model(architecture: str, tmp_path: Path) -> None:
    model = adapted(architecture)
    for kind, limit in (("f16", 0.01), ("q8_0", 0.1), ("q4_k_m", 1.0)):
        folder = Gguf(type=kind, llama_cpp=str(FOLDER)).run(model, tiny_tokenizer(), tmp_path / kind, PROMPTS)
        found = verification(folder)
        assert found["verdict"] == "equal"
        assert found["tokenizer_equal"]
        assert found["max_logprob_difference"] <= limit
        # Random weights leave near ties, which rounding decides: an answer may differ where nothing was at stake.
        assert found["greedy_equal"] == 4 or found["largest_margin_lost"] <= 2 * limit
        assert "gives llama.cpp the chat template's tokens, on 4 prompts" in found["notes"][0]
        assert f"GGUF of type {kind}" in (folder / "README.md").read_text()
    sizes = [(tmp_path / kind / MODEL).stat().st_size for kind in ("f16", "q8_0", "q4_k_m")]
    assert sizes == sorted(sizes, reverse=True)
    assert Merged4bit().run(model, tiny_tokenizer(), tmp_path / "nf4", PROMPTS)


def test_a_trained_model_is_exported_to_every_format(tmp_path: Path) -> None:
    """From the command line, by the run itself, with an adapter; then a checkpoint of it once more."""
    run = tmp_path / "run"
    line = ["experiment=sft", "max_steps=4", "training.checkpoint_every=2", "model.tuning=lora", "hardware=cpu"]
    line += ["logger=none", "eval.max_rows=8", f"hydra.run.dir={run}", f"export.llama_cpp={FOLDER}"]
    outcome = command([*line, "export=[lora,merged_16bit,merged_4bit,gguf]", "export.type=f16"], tmp_path)
    assert outcome.code == 0, outcome.err + outcome.out
    for name in ("lora", "merged_16bit", "merged_4bit", "gguf"):
        found = verification(run / "export" / name)
        assert found["verdict"] == "equal"
        assert found["training_kl"] > 0
    assert verification(run / "export" / "gguf")["max_logprob_difference"] <= 0.01
    assert set(json.loads((run / "summary.json").read_text())["export"]) == {
        "lora",
        "merged_16bit",
        "merged_4bit",
        "gguf",
    }
    page = (run / "export" / "gguf" / "README.md").read_text()
    for part in ("eval/forgetting", "400 rows", "ollama create", "differs by", "max_steps: 4"):
        assert part in page

    done = command([f"run={run}", "checkpoint=2", "export=lora"], tmp_path, export)
    assert done.code == 0, done.err
    assert verification(run / "export" / "checkpoint-2" / "lora")["verdict"] == "equal"


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    gguf = Gguf(type="q8_0", llama_cpp=str(FOLDER))
    model = adapted("qwen3")
    folder = gguf.run(model, tiny_tokenizer(), tmp_path / "out", PROMPTS)
    with torch.no_grad():
        model.get_base_model().model.norm.weight.mul_(2.0)
    with pytest.raises(ExportError, match="log-probability differs by"):
        gguf.verify(TransformersModel(model, tiny_tokenizer()), folder, PROMPTS)
    modelfile = folder / MODELFILE
    modelfile.write_text(modelfile.read_text().replace("<|user|>", "<|user|> "))
    with pytest.raises(ExportError, match="Modelfile's template gives other tokens"):
        gguf.verify(TransformersModel(model, tiny_tokenizer()), folder, PROMPTS)


def test_a_file_that_llama_cpp_cannot_load_is_said_in_a_sentence(tmp_path: Path) -> None:
    gguf = Gguf(type="q8_0", llama_cpp=str(FOLDER))
    model = adapted("qwen3")
    folder = gguf.run(model, tiny_tokenizer(), tmp_path / "out", PROMPTS)
    (folder / MODEL).write_bytes(b"GGUF and nothing else")
    with pytest.raises(ExportError, match="llama_cpp_python ended with code"):
        gguf.verify(TransformersModel(model, tiny_tokenizer()), folder, PROMPTS)
