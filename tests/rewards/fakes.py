"""A character tokenizer, and models whose distributions are known by construction."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

LETTERS = "abcdefghijklmnopqrstuvwxyz "
EOS = len(LETTERS)


class CharTokenizer(PreTrainedTokenizerBase):
    """One id per letter; EOS follows the letters and never comes out of a text."""

    eos_token_id = EOS
    chat_template = None
    added_tokens_decoder: dict = {}
    all_special_tokens: list = []

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list]:
        texts = [text] if isinstance(text, str) else text
        ids = [[LETTERS.index(letter) for letter in one] for one in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def decode(self, ids: list[int]) -> str:
        return "".join(LETTERS[token] for token in ids if token < EOS)

    def __len__(self) -> int:
        return EOS + 1


class TableModel(nn.Module):
    """The next token's distribution depends on the last token alone: row `last` of the table, (V, V) logits."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.calls = 0

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(logits=self.table[input_ids])


class ReciteModel(nn.Module):
    """Knows one answer by heart: `confidence` on the next token while the text ends with the prompt and a beginning of
    the answer, the rest evenly on all others; uniform where the text has left the answer. EOS closes it."""

    def __init__(self, prompt: list[int], answer: list[int], confidence: float) -> None:
        super().__init__()
        self.text, self.confidence, self.start = [*prompt, *answer, EOS], confidence, len(prompt)
        self.anchor = nn.Parameter(torch.empty(0))  # a model is where its parameters are

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        vocabulary = EOS + 1
        logits = torch.zeros(*input_ids.shape, vocabulary)
        others = torch.tensor((1 - self.confidence) / (vocabulary - 1)).log()
        for row, ids in enumerate(input_ids.tolist()):
            for position in range(len(ids)):
                if ids[: position + 1] == self.text[: position + 1] and position + 1 < len(self.text):
                    logits[row, position] = others
                    logits[row, position, self.text[position + 1]] = torch.tensor(self.confidence).log()
        return SimpleNamespace(logits=logits)


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]
