"""Makes a tokenizer such that llama.cpp's converter understands it, where it is of a kind that llama.cpp lacks."""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from selfdistill.models.export import ExportError

# How tokenizers split text before they look for tokens, by llama.cpp's names. The converter knows published tokenizers
# by a hash over their vocabulary; one of the same kind with another vocabulary is found by its pattern here.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe", rf"{_WORDS}\p{{N}}{_REST}": "qwen2"}
SENTENCEPIECE = "tokenizer.model"
EVERY_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}


def prepare_tokenizer(folder: Path, base: str) -> str | None:
    """Completes the tokenizer in this folder for the converter, and rewrites it where llama.cpp has none of its kind.

    Args:
        base: folder or hub name of the base model, whose SentencePiece file transformers doesn't save again.

    Returns:
        llama.cpp's name for its pre-tokenizer where it is known to be this one, whatever the converter's hash says;
        None where the converter is to find out.

    Raises:
        ExportError: a tokenizer that llama.cpp has nothing for.
    """
    if (original := _sentencepiece(base)) is not None:
        shutil.copy(original, folder / SENTENCEPIECE)
        return None
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    kind = tokenizer["model"].get("type", "BPE")
    if kind == "WordLevel":
        if tokenizer.get("normalizer") or tokenizer.get("pre_tokenizer") != EVERY_CHARACTER:
            raise ExportError("llama.cpp has no tokenizer of whole words: the model cannot become a GGUF file")
        rewritten, merges = by_bytes(tokenizer)
        file.write_text(json.dumps(rewritten, ensure_ascii=False), encoding="utf-8")
        # In a file of their own: the tokenizers package would want their parts in the vocabulary.
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return "gpt-2"
    patterns = [part for part in _parts(tokenizer.get("pre_tokenizer")) if part.get("type") == "Split"]
    names = [PATTERNS.get(part.get("pattern", {}).get("Regex")) for part in patterns]
    return names[0] if len(names) == 1 else None


def _sentencepiece(base: str) -> Path | None:
    if not base or Path(base).is_dir():
        local = Path(base) / SENTENCEPIECE
        return local if base and local.is_file() else None
    cached = try_to_load_from_cache(base, SENTENCEPIECE)
    return Path(cached) if isinstance(cached, str) else None


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]


def by_bytes(tokenizer: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A tokenizer of single characters as a byte-level BPE with the same ids, which is what llama.cpp has.

    Characters that the vocabulary lacks have no token there: llama.cpp leaves them out, where transformers has its
    unknown token.

    Returns:
        The tokenizer without merges, and the merges, which put together the characters of several bytes.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    control = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary, merges = {}, []
    for text, token in tokenizer["model"]["vocab"].items():
        spelled = text if text in control else "".join(letters[byte] for byte in text.encode())
        vocabulary[spelled] = token
        if text not in control:
            merges += [(spelled[:end], spelled[end]) for end in range(1, len(spelled))]
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": vocabulary, "merges": [],
    }  # fmt: skip
    # llama.cpp refuses a file without merges; this one is of bytes that no text in UTF-8 has.
    merges = merges or [("ÿ", "ÿ")]
    return tokenizer | {"model": model, "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}, merges
