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
except ImportError:  # older releases are one file
    TextModel = converter.TextModel

known, sentencepiece = TextModel.get_vocab_base_pre, TextModel._create_vocab_sentencepiece


def named(self, tokenizer):
    if forced == "1":
        return name
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return name


def only_where_needed(self):
    # The converter imports the package sentencepiece before it looks whether the model has such a tokenizer.
    if not (self.dir_model / "tokenizer.model").is_file():
        raise FileNotFoundError(self.dir_model / "tokenizer.model")
    return sentencepiece(self)


TextModel.get_vocab_base_pre, TextModel._create_vocab_sentencepiece = named, only_where_needed
sys.argv = ["convert_hf_to_gguf.py", *arguments]
converter.main()
