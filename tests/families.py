"""Small tokenizers of every family in use, each with a chat template of its kind, trained here in a moment."""

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. user assistant system end of turn start",
    "def f(x): return x**2  # 12345\n\tif a < b and c > d: print('<tag>')",
    "Überraschung, naïveté; 知識の蒸留 и обучение. 🦊 im_start im_end",
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "(m['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + "
    "eos_token }}{% else %}{{ '<｜User｜>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
# As JSON, twice, and cut: whatever a template does with the text, no token may come of it.
ODD = (
    "{% for m in messages %}[SEP]{{ m['content'] | tojson }} {{ m['content'][:40] | upper }} {{ m['content'][:40] }}"
    "{{ '[CLS]' if m['role'] == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}[MASK]{% endif %}"
)


def _byte_level(vocabulary: int = 400) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _sentencepiece(prepend: str, specials: list[str]) -> Tokenizer:
    """As Llama's and Gemma's: spaces are ▁, characters outside the vocabulary are bytes, special tokens lie within."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(" ", 1, 0)] if prepend != "never" else []),
    ])  # fmt: skip
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*specials, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    state = json.loads(tokenizer.to_str())  # bytes are pieces of the vocabulary, and not added tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    bos = specials[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    return tokenizer


def _fast(tokenizer: Tokenizer, template: str, **settings: Any) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    fast.chat_template = template
    return fast


@cache
def qwen() -> PreTrainedTokenizerFast:
    """ChatML; thinking and tool tags are added tokens that are not special."""
    fast = _fast(_byte_level(), CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tags = ("<think>", "</think>", "<tool_call>")
    fast.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return fast


@cache
def qwen_base() -> PreTrainedTokenizerFast:
    """The same template, with another end of sequence than the end of a turn."""
    fast = _fast(_byte_level(), CHATML, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return fast


@cache
def gemma() -> PreTrainedTokenizerFast:
    """Ends a turn with another token than a sequence, and refuses a system turn."""
    specials = ["<unk>", "<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"]
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return _fast(_sentencepiece("never", specials), GEMMA, **names)


@cache
def llama_2() -> PreTrainedTokenizerFast:
    """Puts a space before every text; its turns are plain text."""
    specials = ["<unk>", "<s>", "</s>"]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return _fast(_sentencepiece("first", specials), LLAMA_2, **names)


@cache
def deepseek() -> PreTrainedTokenizerFast:
    """The tokens between turns are not special."""
    fast = _fast(_byte_level(), DEEPSEEK, bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>")
    fast.add_tokens(
        [AddedToken(tag, special=False) for tag in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")]
    )
    return fast


@cache
def t5() -> PreTrainedTokenizerFast:
    return _fast(_unigram(), LLAMA_2, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", bos_token="<pad>")


@cache
def bert() -> PreTrainedTokenizerFast:
    names = {"sep_token": "[SEP]", "cls_token": "[CLS]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    return _fast(_word_piece(), ODD, pad_token="[PAD]", **names)


@cache
def by_t5() -> PreTrainedTokenizerBase:
    """Written in Python, without offsets."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = LLAMA_2.replace("bos_token", "pad_token")
    return tokenizer


FAMILIES = {
    "embedded": tiny_tokenizer, "qwen": qwen, "qwen_base": qwen_base, "gemma": gemma, "llama_2": llama_2,
    "deepseek": deepseek, "t5": t5, "bert": bert, "by_t5": by_t5,
}  # fmt: skip
