"""What a reward function may return, brought to one form."""

import contextlib
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from selfdistill.errors import UserError

FORMS = 'one entry per completion, each a number, None or {"score": number or None, "feedback": text or None}'


def normalise(
    result: Any, name: str, count: int, function: Callable[..., Any] | None = None
) -> tuple[list[float | None], list[str | None]]:
    """Scores and feedback, one of each per completion, from whatever a reward function returned.

    Entries may be numbers (NaN counts as None), booleans, None, or mappings with `score` and, where there is something
    to say, `feedback`. Where no entry has feedback, the attribute `last_feedback` of `function` is read, which is a
    convention of other libraries.

    Raises:
        UserError: anything else, with the function's name, the row and what was returned.
    """
    if hasattr(result, "tolist"):  # a tensor or an array
        result = result.tolist()
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Sequence):
        raise UserError(f"reward function {name} returned {_described(result)}; return {FORMS}")
    if len(result) != count:
        raise UserError(
            f"reward function {name} returned {len(result)} entries for {count} completions; return {FORMS}"
        )
    scores: list[float | None] = []
    feedback: list[str | None] = []
    for row, entry in enumerate(result):
        text = None
        if isinstance(entry, Mapping):
            if "score" not in entry:
                raise UserError(
                    f'reward function {name}, row {row}: {_described(entry)} has no "score"; return {FORMS}'
                )
            entry, text = entry["score"], entry.get("feedback")
        scores.append(_score(entry, name, row))
        feedback.append(_feedback(text, name, row))
    last = getattr(function, "last_feedback", None)
    if last is not None and not any(feedback):
        if isinstance(last, str) or not isinstance(last, Sequence) or len(last) != count:
            raise UserError(
                f"reward function {name}: its last_feedback is {_described(last)}; "
                f"make it a list of {count} entries, each text or None"
            )
        feedback = [_feedback(text, name, row) for row, text in enumerate(last)]
    return scores, feedback


def _score(value: Any, name: str, row: int) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item"):  # a zero-dimensional tensor or array scalar
        with contextlib.suppress(ValueError, RuntimeError):
            value = value.item()
    if not isinstance(value, numbers.Real):
        raise UserError(f"reward function {name}, row {row}: the score is {_described(value)}; return {FORMS}")
    score = float(value)
    if math.isinf(score):
        raise UserError(
            f"reward function {name}, row {row}: the score is {score}; an infinite score makes every advantage of its "
            f"group undefined. Return a finite number, or None for a completion that cannot be judged"
        )
    return None if math.isnan(score) else score


def _feedback(value: Any, name: str, row: int) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    raise UserError(f"reward function {name}, row {row}: the feedback is {_described(value)}; return {FORMS}")


def _described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 120 else text[:117] + '...'}"
