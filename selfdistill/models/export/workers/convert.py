"""Runs llama.cpp's converter: convert.py FOLDER_OF_LLAMA_CPP PRE_TOKENIZER FORCED(0 or 1) ARGUMENTS…

The converter knows a pre-tokenizer by a hash of what the tokenizer makes of a text; a custom tokenizer's is unknown to
it and is named by PRE_TOKENIZER.
"""

import sys

folder, name, forced, *arguments = sys.argv[1:]
sys.path.insert(0, folder)
import convert_hf_to_gguf as converter  # noqa: E402

try:
    from conversion.base import TextModel
except ImportError:  # releases before 2026 are one file
    TextModel = converter.TextModel

known = TextModel.get_vocab_base_pre


def named(self, tokenizer):
    if forced == "1":
        return name
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return name


TextModel.get_vocab_base_pre = named
sys.argv = ["convert_hf_to_gguf.py", *arguments]
converter.main()
