"""Models of real sizes with random weights, and a tokenizer for them: nothing is downloaded.

How long a step takes and how much memory it needs depends on shapes, not on what the weights know.
"""

import shutil
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from experiments.gpu.cases import folder_name
from experiments.gpu.device import Device

END_OF_TEXT, TURN_BEGINS, TURN_ENDS = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What config.json of these models says.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {  # Qwen2.5-0.5B
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "0.6b": {  # Qwen3-0.6B
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "7b": {  # Qwen2.5-7B
        "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip


def shape_of(name: str, device: Device) -> dict[str, Any]:
    """The sizes that stand for this name on this device: on a CPU tiny ones of the same architecture."""
    return SHAPES[name] if device.on_gpu else SHAPES[name] | TINY


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without training: pairs of letters, pairs of pairs, and chat's special tokens.

    Args:
        vocabulary: how many tokens; each has a text, so that what a random model writes can be read again.
    """
    letters = [f"{a}{b}" for a, b in product(ascii_lowercase, repeat=2)]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = [(pair[0], pair[1]) for pair in letters]
    left = vocabulary - len(tokens) - len(merges) - len(SPECIAL)
    if left < 0:
        raise ValueError(f"a vocabulary of {vocabulary} is too small: at least {vocabulary - left}")
    merges += islice(product(letters, repeat=2), left)
    tokens += [first + second for first, second in merges]
    bpe = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_ENDS,
        pad_token=END_OF_TEXT,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=32_768,
    )


def model_folder(shape: str, device: Device, work: Path, seed: int = 0) -> Path:
    """Where a model of this shape lies, made on the spot where it does not yet.

    Args:
        work: the folder that keeps models between cases.
        seed: of the weights; another one for a teacher of its own.
    """
    folder = work / folder_name(shape, seed, tiny=not device.on_gpu)
    if folder.is_dir():
        return folder
    sizes = shape_of(shape, device)
    tokenizer = tokenizer_of(sizes["vocab_size"])
    config = AutoConfig.for_model(
        **sizes,
        max_position_embeddings=32_768,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    with torch.device(device.torch_device):  # seconds on a GPU, minutes on a CPU
        model = AutoModelForCausalLM.from_config(config, dtype=device.dtype)
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a case that was ended while it wrote
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    draft.rename(folder)
    return folder
