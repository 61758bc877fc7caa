"""Models for tests: a random one of a few thousand parameters with the embedded model's tokenizer."""

from functools import cache

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from selfdistill.models.loading import resolve


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(resolve("embedded"))


def tiny_model(seed: int = 0, hidden: int = 32, vocabulary: int | None = None, tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary or len(tiny_tokenizer()), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
        tie_word_embeddings=tied, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()
