"""What a reward function may return, brought to one form."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.text import whole_characters

FORMS = 'one entry per completion, each a number, None or {"score": number or None, "feedback": text or None}'


def normalise(
    result: Any, name: str, count: int, function: Callable[..., Any] | None = None
) -> tuple[list[float | None], list[str | None]]:
    """Scores and feedback, one of each per completion, from whatever a reward function returned.

    Entries may be finite numbers, booleans, None, or mappings with `score` and, where there is something
    to say, `feedback`. Where no entry has feedback, the attribute `last_feedback` of `function` is read, which is a
    convention of other libraries.

    Raises:
        UserError: anything else, with the function's name, the row and what was returned.
    """
    if isinstance(result, Tensor | np.ndarray):
        result = result.tolist()
    who = f"reward function {name}"
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Sequence):
        raise UserError(f"{who} returned {_described(result)}; return {FORMS}")
    if len(result) != count:
        raise UserError(f"{who} returned {len(result)} entries for {count} completions; return {FORMS}")
    scores: list[float | None] = []
    feedback: list[str | None] = []
    for row, entry in enumerate(result):
        place, text = f"{who}, row {row}", None
        if isinstance(entry, Mapping):
            if "score" not in entry:
                raise UserError(f'{place}: {_described(entry)} has no "score"; return {FORMS}')
            entry, text = entry["score"], entry.get("feedback")
        scores.append(_score(entry, place))
        feedback.append(_feedback(text, place))
    last = getattr(function, "last_feedback", None)
    if last is not None and not any(feedback):
        if isinstance(last, str) or not isinstance(last, Sequence) or len(last) != count:
            raise UserError(
                f"{who}: its last_feedback is {_described(last)}; make it a list of {count} entries, each text or None"
            )
        feedback = [_feedback(text, f"{who}, row {row}") for row, text in enumerate(last)]
    return scores, feedback


def _score(value: Any, place: str) -> float | None:
    if value is None:
        return None
    try:
        finite = math.isfinite(value)  # takes tensors and arrays of one number too, and refuses text
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{place}: the score is {_described(value)}; return {FORMS}") from None
    if not finite:
        raise UserError(
            f"{place}: the score is {float(value)}, which leaves every advantage of its group undefined. "
            f"Return a finite number, or None for a completion that cannot be judged"
        )
    return float(value)


def _feedback(value: Any, place: str) -> str | None:
    if value is None or isinstance(value, str):
        return whole_characters(value) if value else None
    raise UserError(f"{place}: the feedback is {_described(value)}; return {FORMS}")


def _described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 120 else text[:117] + '...'}"
