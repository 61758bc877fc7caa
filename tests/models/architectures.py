"""Tiny random models of many architectures, and what is expected of each; `python -m` this module writes the page.

`tests/models/test_architectures.py` checks every expectation, and that docs/ARCHITECTURES.md is this table.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from tests.reference import ROOT
from tests.tiny import tiny_tokenizer

PAGE = ROOT / "docs" / "ARCHITECTURES.md"
RIGHT, TOLD, REFUSED = "right", "told", "refused"

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
STATES = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
WINDOW = {"sliding_window": 4}
XLSTM_KERNELS = {
    "chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
}  # fmt: skip

DROPOUT = (
    "dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "attn_pdrop", "resid_pdrop", "embd_pdrop", "embed_dropout", "resid_dropout",
    "residual_dropout", "layerdrop",
)  # fmt: skip


@dataclass
class Architecture:
    """One architecture and what is expected of it.

    Attributes:
        config: the name of its configuration class in transformers.
        values: what that class is called with, beside the vocabulary.
        padding: `right` as it is, `told` where it gets its positions from us, or `refused`.
        head: whether our logits are the model's: `right` or `refused`.
        hybrid: whether a step with policy gradient and divergence is what it should be: `right` or `refused`.
        auto: transformers' class that makes it.
    """

    config: str
    values: dict[str, Any] = field(default_factory=dict)
    padding: str = RIGHT
    head: str = RIGHT
    hybrid: str = RIGHT
    auto: str = "AutoModelForCausalLM"

    def model(self) -> Any:
        """A random model with lively predictions, in evaluation mode."""
        torch.manual_seed(0)
        special = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
        kind = getattr(transformers, self.config)
        config = kind(**{"vocab_size": len(tiny_tokenizer()), **special, **self.values})
        for name in DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        model = getattr(transformers, self.auto).from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for p in model.parameters():
                # Norms that are all ones would hide what depends on positions.
                p.copy_(p * 4.0 if p.dim() > 1 else p + torch.randn_like(p) * 0.1)
        model.generation_config.eos_token_id = [2, *range(4, len(tiny_tokenizer()), 5)]  # answers of many lengths
        return model


def shaped(config: str, *without: str, **values: Any) -> dict[str, Any]:
    """The keys of the most common kind of configuration."""
    kept = {name: value for name, value in SHAPE.items() if name not in without}
    return {"config": config, "values": {**kept, **values}}


NO_HEAD_DIM = ("head_dim",)
ARCHITECTURES: dict[str, Architecture] = {
    "Apertus": Architecture(**shaped("ApertusConfig", *NO_HEAD_DIM)),
    "Bamba": Architecture(
        **shaped("BambaConfig", *NO_HEAD_DIM, **MAMBA2, mamba_chunk_size=4, attn_layer_indices=[1])
    ),
    "BioGPT": Architecture(**shaped("BioGptConfig", *NO_HEAD_DIM, "num_key_value_heads"), padding=TOLD),
    "BLOOM": Architecture("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "Cohere": Architecture(**shaped("CohereConfig", *NO_HEAD_DIM, logit_scale=0.25)),
    "Cohere 2": Architecture(
        **shaped("Cohere2Config", **WINDOW, logit_scale=0.25, layer_types=["sliding_attention", "full_attention"])
    ),
    "CTRL": Architecture("CTRLConfig", {**GPT, "dff": 64}, padding=TOLD),
    "DeepSeek-V3": Architecture(
        **shaped(
            "DeepseekV3Config", *NO_HEAD_DIM, **EXPERTS, **LATENT, n_routed_experts=4, n_group=1, topk_group=1,
            first_k_dense_replace=1,
        )
    ),
    "DiffLlama": Architecture(**shaped("DiffLlamaConfig", num_key_value_heads=2)),
    "ERNIE 4.5": Architecture(**shaped("Ernie4_5Config")),
    "EXAONE 4": Architecture(**shaped("Exaone4Config", **WINDOW)),
    "Falcon": Architecture(
        "FalconConfig", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": False}
    ),
    "Falcon-H1": Architecture(
        **shaped("FalconH1Config", **{**MAMBA2, "mamba_n_heads": 8, "mamba_d_head": 8}, mamba_d_ssm=64,
                 lm_head_multiplier=0.06)
    ),
    "Falcon Mamba": Architecture("FalconMambaConfig", STATES),
    "Gemma": Architecture(**shaped("GemmaConfig")),
    "Gemma 2": Architecture(
        **shaped("Gemma2Config", **WINDOW, query_pre_attn_scalar=16, final_logit_softcapping=2.0)
    ),
    "Gemma 3": Architecture(**shaped("Gemma3TextConfig", **WINDOW, query_pre_attn_scalar=16)),
    "GLM-4": Architecture(**shaped("Glm4Config")),
    "GPT-2": Architecture("GPT2Config", GPT, padding=TOLD),
    "GPT-BigCode": Architecture("GPTBigCodeConfig", GPT, padding=TOLD),
    "GPT-J": Architecture("GPTJConfig", {**GPT, "rotary_dim": 8}),
    "GPT-Neo": Architecture(
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
         "max_position_embeddings": 512, "window_size": 4},
        padding=TOLD,
    ),
    "GPT-NeoX": Architecture(**shaped("GPTNeoXConfig", *NO_HEAD_DIM, "num_key_value_heads")),
    "GPT-OSS": Architecture(
        **shaped("GptOssConfig", **WINDOW, num_local_experts=4, num_experts_per_tok=2,
                 layer_types=["sliding_attention", "full_attention"])
    ),
    "Granite": Architecture(**shaped("GraniteConfig", logits_scaling=3.0)),
    "Granite 4 (hybrid MoE)": Architecture(
        **shaped("GraniteMoeHybridConfig", *NO_HEAD_DIM, **MAMBA2, logits_scaling=3.0, num_local_experts=4,
                 num_experts_per_tok=2, shared_intermediate_size=32, layer_types=["mamba", "attention"])
    ),
    "Hunyuan": Architecture(**shaped("HunYuanDenseV1Config"), padding=TOLD),
    "HyperCLOVA X": Architecture(**shaped("HyperCLOVAXConfig", logits_scaling=3.0)),
    "Jamba": Architecture(
        **shaped("JambaConfig", *NO_HEAD_DIM, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                 expert_layer_offset=1, num_experts=2, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False)
    ),
    "LFM2": Architecture(
        **shaped("Lfm2Config", *NO_HEAD_DIM, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    ),
    "Llama": Architecture(**shaped("LlamaConfig")),
    "Mamba": Architecture("MambaConfig", STATES),
    "Mamba-2": Architecture("Mamba2Config", {**STATES, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    "MiniCPM3": Architecture(**shaped("MiniCPM3Config", *NO_HEAD_DIM, **LATENT)),
    "MiniMax": Architecture(
        **shaped("MiniMaxConfig", num_local_experts=4, num_experts_per_tok=2, block_size=4,
                 layer_types=["linear_attention", "full_attention"])
    ),
    "Mistral": Architecture(**shaped("MistralConfig", **WINDOW)),
    "Mixtral": Architecture(**shaped("MixtralConfig", num_local_experts=4, num_experts_per_tok=2)),
    "Muse Glimmer (image and text)": Architecture(
        "MuseGlimmerConfig",
        {
            "text_config": {
                **SHAPE, **WINDOW, "vocab_size": len(tiny_tokenizer()), "pad_token_id": 0, "eos_token_id": 2,
                "bos_token_id": None, "output_multiplier": 0.5, "final_logit_softcapping": 2.0,
            },
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "pos_emb_height": 2, "pos_emb_width": 2, "patch_size": 2,
            },
            "out_hidden_size": 16, "projector_hidden_size": 16,
        },
        auto="AutoModelForImageTextToText",
    ),
    "nanochat": Architecture(**shaped("NanoChatConfig", *NO_HEAD_DIM)),
    "Nemotron": Architecture(**shaped("NemotronConfig")),
    "Nemotron-H": Architecture(
        **shaped("NemotronHConfig", layers_block_type=["mamba", "attention"], mamba_num_heads=4, mamba_head_dim=16,
                 ssm_state_size=8, n_groups=1, chunk_size=4)
    ),
    "OLMo": Architecture(**shaped("OlmoConfig", *NO_HEAD_DIM)),
    "OLMo 2": Architecture(**shaped("Olmo2Config", *NO_HEAD_DIM)),
    "OLMo 3": Architecture(**shaped("Olmo3Config", *NO_HEAD_DIM)),
    "OLMoE": Architecture(**shaped("OlmoeConfig", *NO_HEAD_DIM, num_experts=4, num_experts_per_tok=2)),
    "OPT": Architecture(
        "OPTConfig",
        {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "max_position_embeddings": 512, "word_embed_proj_dim": 16},
    ),
    "Persimmon": Architecture(**shaped("PersimmonConfig", *NO_HEAD_DIM, "num_key_value_heads")),
    "Phi": Architecture(**shaped("PhiConfig", *NO_HEAD_DIM)),
    "Phi-3": Architecture(**shaped("Phi3Config", *NO_HEAD_DIM)),
    "Qwen2": Architecture(**shaped("Qwen2Config")),
    "Qwen2-MoE": Architecture(
        **shaped("Qwen2MoeConfig", **EXPERTS, num_experts=4, shared_expert_intermediate_size=16)
    ),
    "Qwen3": Architecture(**shaped("Qwen3Config")),
    "Qwen3-MoE": Architecture(**shaped("Qwen3MoeConfig", **EXPERTS, num_experts=4)),
    "Qwen3-Next": Architecture(
        **shaped("Qwen3NextConfig", **EXPERTS, num_experts=4, shared_expert_intermediate_size=16,
                 linear_num_value_heads=2, linear_num_key_heads=1, linear_key_head_dim=16, linear_value_head_dim=16,
                 layer_types=["linear_attention", "full_attention"])
    ),
    "RecurrentGemma": Architecture(
        **shaped("RecurrentGemmaConfig", "max_position_embeddings", num_hidden_layers=3, lru_width=32,
                 attention_window_size=64, logits_soft_cap=2.0),
        padding=REFUSED, hybrid=REFUSED,
    ),
    "RWKV": Architecture("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2}, padding=REFUSED, hybrid=REFUSED),
    "Seed-OSS": Architecture(**shaped("SeedOssConfig")),
    "SmolLM3": Architecture(**shaped("SmolLM3Config", *NO_HEAD_DIM)),
    "StableLM": Architecture(**shaped("StableLmConfig", *NO_HEAD_DIM)),
    "StarCoder 2": Architecture(**shaped("Starcoder2Config", *NO_HEAD_DIM)),
    "xLSTM": Architecture(
        "xLSTMConfig",
        {"hidden_size": 32, "embedding_dim": 32, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 2,
         "chunk_size": 4, "output_logit_soft_cap": 2.0, **XLSTM_KERNELS},
        padding=REFUSED, hybrid=REFUSED,
    ),
    "XGLM": Architecture(
        "XGLMConfig", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2,
                       "max_position_embeddings": 512}, padding=TOLD,
    ),
    "Zamba2": Architecture(
        **shaped("Zamba2Config", mamba_d_state=8, n_mamba_heads=4, mamba_headdim=16, mamba_ngroups=1, chunk_size=4,
                 layers_block_type=["mamba", "hybrid"], num_mem_blocks=1, use_mem_rope=True)
    ),
}  # fmt: skip

HEADING = """# Architectures

Every causal language model of transformers can be the student or the teacher, as far as the following holds for it. It
is found out on a few tokens before a run begins, for the model at hand and not by its name, and a model for which it
does not hold is refused with the reason. The table is what was found for tiny random models of {count} architectures
(transformers {transformers}, TRL {trl}, on a CPU); `python -m tests.models.architectures` writes it, and
`python -m pytest tests/models/test_architectures.py` finds every cell again.

- **padding**: a row's log-probabilities are the same alone and beside longer rows. *right*: as the model is. *told*: it
  counts padding as positions, so it is given those that follow from the attention mask, in our passes, in TRL's and in
  sampling. *refused*: it takes padding for tokens, so that completions sampled in batches would not be its own.
- **head**: the logits that a divergence is computed from (the output head times hidden states, with the model's bias,
  scale and soft cap) are the model's own.
- **hybrid**: one step with a policy gradient and a divergence has the loss and the gradient of a naive computation on
  all logits of each row alone. A mixture of experts is compared without the load-balancing
  loss that TRL adds to its policy gradient. *refused*: for its padding. (A model is refused a policy gradient too where
  TRL's log-probabilities are not its own; none of these is.)

Learned prompts (prompt tuning and its kind) are right too. A vision-language model is trained on text; data with images
is refused where a teacher, cross-entropy or a reward that asks the policy would look at the text alone. One that
`AutoModelForCausalLM` does not load, such as Muse Glimmer, is given from Python.

| architecture | padding | head | hybrid |
|---|---|---|---|
"""


def page() -> str:
    """The whole of docs/ARCHITECTURES.md."""
    import trl

    lines = [f"| {name} | {a.padding} | {a.head} | {a.hybrid} |\n" for name, a in ARCHITECTURES.items()]
    versions = {m.__name__: ".".join(m.__version__.split(".")[:2]) for m in (transformers, trl)}
    return HEADING.format(count=len(lines), **versions) + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
