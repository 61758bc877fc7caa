"""Reading vLLM's `prompt_logprobs`, strictly: what does not fit to what was sent is refused, never repaired."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfdistill.teachers.server.client import ReplyError

# vLLM writes -inf, for which JSON has no number, as -9999.
MINUS_INFINITY = -9998.0
SLACK = 1e-3
ALL = -1


@dataclass(frozen=True)
class Positions:
    """What the server says of T successive tokens, float64.

    Attributes:
        logprobs: (T,) log-probability of each token that was sent.
        top_ids: (T, k) the k likeliest tokens, likeliest first.
        top_logprobs: (T, k) their log-probabilities.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def scoring_body(model: str, rows: Sequence[Sequence[int]], k: int) -> dict[str, Any]:
    """The request body that asks for the k likeliest tokens (-1: all) at every position of each row of token ids."""
    return {
        "model": model, "prompt": [list(row) for row in rows], "max_tokens": 1, "temperature": 1.0,
        "prompt_logprobs": k, "return_token_ids": True,
    }  # fmt: skip


def choices_of(reply: Any, count: int) -> list[dict[str, Any]]:
    """The `count` choices of a reply in the order of the prompts."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise ReplyError("it has no list of choices")
    if sorted(choice["index"] if isinstance(choice.get("index"), int) else -1 for choice in choices) != list(
        range(count)
    ):
        raise ReplyError(f"it has {len(choices)} choices for {count} prompts, or wrong indices")
    return sorted(choices, key=lambda choice: choice["index"])


def read_positions(choice: dict[str, Any], ids: Sequence[int], first: int, k: int) -> Positions:
    """The positions from `first` on of one row.

    Args:
        choice: one choice of the reply.
        ids: the token ids that were sent.
        first: index of the first token of interest; at least 1, for nothing precedes token 0.
        k: as it was asked for; 0 for the sent tokens alone, -1 for the whole vocabulary.

    Raises:
        ReplyError: anything that is not exactly what was asked for.
    """
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and echoed != list(ids):
        raise ReplyError("it speaks of other token ids than were sent")
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise ReplyError("it has no prompt_logprobs")
    if len(entries) != len(ids):
        raise ReplyError(f"prompt_logprobs has {len(entries)} positions for {len(ids)} tokens")
    if ids and entries[0] is not None:
        raise ReplyError("the first token has a log-probability, although nothing precedes it")
    for position in range(1, len(ids)):
        entry = entries[position]
        if not isinstance(entry, dict) or str(ids[position]) not in entry:
            raise ReplyError(f"position {position} says nothing of token {ids[position]}, which stands there")
    wanted = entries[first:]
    everything = k == ALL
    if everything:
        k = len(wanted[0]) if wanted else 0
    rows = [_read_entry(entry, ids[first + i], k, first + i) for i, entry in enumerate(wanted)]
    result = Positions(
        logprobs=np.array([row[0] for row in rows], dtype=np.float64).reshape(len(rows)),
        top_ids=np.array([row[1] for row in rows], dtype=np.int64).reshape(len(rows), k),
        top_logprobs=np.array([row[2] for row in rows], dtype=np.float64).reshape(len(rows), k),
    )
    if everything and (np.sort(result.top_ids, axis=-1) != np.arange(k)).any():
        raise ReplyError("it does not hold the whole vocabulary, which was asked for")
    _check_numbers(result)
    return result


def _read_entry(entry: dict[str, Any], token: int, k: int, position: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The sent token's log-probability, and ids and log-probabilities of the k likeliest."""
    try:
        ids = np.array([int(key) for key in entry], dtype=np.int64)
        values = [value["logprob"] for value in entry.values()]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ReplyError(f"position {position} is not a table from token ids to log-probabilities") from None
    if not {type(value) for value in values} <= {float, int}:
        raise ReplyError(f"position {position} has a log-probability that is not a number")
    logprobs = np.array(values, dtype=np.float64)
    logprobs[logprobs <= MINUS_INFINITY] = -np.inf
    own = logprobs[ids == token]
    if len(own) != 1 or ids.min() < 0:
        raise ReplyError(f"position {position} has no single value for token {token}")
    if len(ids) == k + 1:  # the sent token is not among the k likeliest, and stands beside them
        others = ids != token
        ids, logprobs = ids[others], logprobs[others]
        if k and own[0] > logprobs.min() + SLACK:
            raise ReplyError(f"position {position} leaves token {token} out of the {k} likeliest, to which it belongs")
    elif len(ids) != k:
        raise ReplyError(f"position {position} has {len(ids)} log-probabilities, {k} were asked for")
    order = np.lexsort((ids, -logprobs))
    return float(own[0]), ids[order], logprobs[order]


def _check_numbers(positions: Positions) -> None:
    for values in (positions.logprobs, positions.top_logprobs):
        if np.isnan(values).any():
            raise ReplyError("a log-probability is NaN")
        if (values > SLACK).any():
            raise ReplyError("a log-probability is above 0")
    if (np.exp(positions.top_logprobs).sum(-1) > 1 + SLACK).any():
        raise ReplyError("the probabilities at a position add up to more than 1")
    np.minimum(positions.logprobs, 0.0, out=positions.logprobs)
    np.minimum(positions.top_logprobs, 0.0, out=positions.top_logprobs)
