"""What may have been meant by a word that is not known, in the words of every message. Imports nothing heavy."""

import difflib
from collections.abc import Iterable
from typing import Any

# `golden` is like `golden_response` (0.57), `output` is not like `prompt` (0.5).
LIKENESS = 0.55
SHOWN = 12


def nearest(word: str, choices: Iterable[Any]) -> str | None:
    """The choice that is most like the word, in whatever case; None where none is like it."""
    known = {str(choice).casefold(): str(choice) for choice in choices}
    found = difflib.get_close_matches(word.casefold(), known, n=1, cutoff=LIKENESS)
    return known[found[0]] if found else None


def guess(word: str, choices: Iterable[Any]) -> str:
    """The end of a sentence that has named the choices: `; did you mean X?`, or a full stop."""
    near = nearest(word, choices)
    return f"; did you mean {near}?" if near else "."


def closest(word: str, choices: Iterable[Any]) -> str:
    """`did you mean X?`, or the choices; of many, those most like the word. Hidden choices (`_name`) are left out."""
    known = sorted({str(choice) for choice in choices if not str(choice).startswith("_")})
    if near := nearest(word, known):
        return f"did you mean {near}?"
    if len(known) > SHOWN:
        known = [*difflib.get_close_matches(word, known, n=SHOWN, cutoff=0.0), "…"]
    return f"known here: {', '.join(known)}" if known else "nothing can be set here"
