"""Two texts in two columns, the tokens in which they differ marked: to be read as plain text and in a browser alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import TYPE_CHECKING

from rich.cells import cell_len, chop_cells

from selfdistill.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMN_CELLS = 60
OPENED, CLOSED, LINE_BREAK = "⟦", "⟧", "⏎"
# Pairs of tokens that are compared. Beyond, what stands between the common beginning and end counts as one difference.
COMPARED_PAIRS = 4_000_000


@dataclass(frozen=True)
class Stretch:
    """Tokens that stand on both sides, or the tokens of each side that stand there instead of the other's.

    Attributes:
        left, right: their texts; the same where `same` is true.
    """

    same: bool
    left: str
    right: str


def stretches(tokenizer: "PreTrainedTokenizerBase", left: Sequence[int], right: Sequence[int]) -> list[Stretch]:
    """The two lists of token ids from their beginnings to their ends, in stretches that are the same or differ."""

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids))) if ids else ""

    found = []
    for same, a, b in _aligned(list(left), list(right)):
        if a or b:
            found.append(Stretch(same, text(a), text(b)))
    return found


def _aligned(left: list[int], right: list[int]) -> list[tuple[bool, list[int], list[int]]]:
    shorter = min(len(left), len(right))
    start = next((n for n in range(shorter) if left[n] != right[n]), shorter)
    rest = shorter - start
    end = next((n for n in range(rest) if left[-1 - n] != right[-1 - n]), rest)
    a, b = left[start : len(left) - end], right[start : len(right) - end]
    parts = [(False, a, b)]
    if len(a) * len(b) <= COMPARED_PAIRS:
        codes = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
        parts = [(tag == "equal", a[i:j], b[k:m]) for tag, i, j, k, m in codes]
    return [(True, left[:start], right[:start]), *parts, (True, left[len(left) - end :], right[len(right) - end :])]


def columns(parts: Sequence[Stretch], left_title: str, right_title: str) -> str:
    """The two texts beside each other. A line break that both have begins a new row of the table."""
    rows = [(left_title, right_title), ("─" * COLUMN_CELLS, "─" * COLUMN_CELLS)]
    left = right = ""
    for part in parts:
        if not part.same:
            left += _marked(part.left)
            right += _marked(part.right)
            continue
        first, *others = printable(part.left).split("\n")
        left, right = left + first, right + first
        for line in others:
            rows += zip_longest(_wrapped(left), _wrapped(right), fillvalue="")
            left = right = line
    rows += zip_longest(_wrapped(left), _wrapped(right), fillvalue="")
    return "\n".join(f"{a}{' ' * (COLUMN_CELLS - cell_len(a))} │ {b}".rstrip() for a, b in rows)


def _marked(text: str) -> str:
    """Each line of a differing text in brackets, with its line break; a text of nothing stays nothing."""
    lines = printable(text).replace("\n", f"{LINE_BREAK}\n").split("\n")
    return "\n".join(f"{OPENED}{line}{CLOSED}" if line else "" for line in lines)


def _wrapped(text: str) -> list[str]:
    return [part for line in text.expandtabs(4).split("\n") for part in chop_cells(line, COLUMN_CELLS) or [""]]
