"""Log-probabilities of given tokens from a served model, by vLLM's `prompt_logprobs`: how they are asked for and read.

Rows share requests, and answers come from the cache first. A reply that does not fit is refused, never repaired.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save

from selfdistill.errors import UserError
from selfdistill.losses import TopTokens
from selfdistill.teachers.server.client import REPLY_BYTES, Client, ReplyError, RequestRefused, all_of, part
from selfdistill.teachers.server.reply_cache import ReplyCache, cache_key

# vLLM writes -inf, for which JSON has no number, as -9999.
MINUS_INFINITY = -9998.0
SLACK = 1e-3
ALL = -1
# Bounds what a server holds at once for one request: prompt log-probabilities of the whole vocabulary take much memory.
REQUEST_TOKENS = 2048
# Of a reply, for each log-probability in it: three to four times what vLLM writes.
LOGPROB_BYTES = 512
VOCABULARY = 300_000  # log-probabilities of a token, at most, where all are asked for


class TokenRow(NamedTuple):
    """A prompt and its completion as one list of token ids."""

    ids: list[int]
    prompt_tokens: int


class TopKRefused(UserError):
    """The server gives at most `limit` log-probabilities a token."""

    def __init__(self, message: str, limit: int) -> None:
        super().__init__(message)
        self.limit = limit


async def score_rows(client: Client, model: str, rows: Sequence[TokenRow], k: int) -> list[TopTokens]:
    """What the model says of each row's completion, in one request.

    Raises:
        TopKRefused: k is above the server's limit.
        ServerUnavailable, RequestRefused, MalformedReply: as `Client.request`.
    """

    def decode(reply: Any) -> list[TopTokens]:
        choices = choices_of(reply, len(rows))
        return [read_positions(choice, *row, k) for choice, row in zip(choices, rows, strict=True)]

    body = scoring_body(model, [row.ids for row in rows], k)
    entries = sum(len(row.ids) for row in rows) * (k + 1 if k != ALL else VOCABULARY)
    try:
        return await client.request("POST", "completions", body, decode, REPLY_BYTES + entries * LOGPROB_BYTES)
    except RequestRefused as error:
        found = re.search(r"max(?:imum)? allowed[^0-9]*(\d+)", error.detail)
        if found is None:
            raise
        key, limit = f"{client.key_prefix}top_k", int(found[1])
        written = f"{key}=null (the whole vocabulary)" if k == ALL else f"{key}={k}"
        raise TopKRefused(
            f"{written}: {client.name} gives at most {limit} log-probabilities a token. Write {key}={limit} or less, "
            f"or start the server with --max-logprobs {k}.",
            limit,
        ) from None


def scoring_body(model: str, rows: Sequence[Sequence[int]], k: int) -> dict[str, Any]:
    """The request body that asks for the k likeliest tokens (-1: all) at every position of each row of token ids."""
    body = {"model": model, "prompt": [list(row) for row in rows], "max_tokens": 1, "temperature": 1.0}
    return {**body, "prompt_logprobs": k, "return_token_ids": True}


def choices_of(reply: Any, count: int) -> list[dict[str, Any]]:
    """The `count` choices of a reply in the order of the prompts."""
    choices = part(reply, "choices", list)
    if sorted(part(choice, "index", int) for choice in choices) != list(range(count)):
        raise ReplyError(f"it has {len(choices)} choices for {count} prompts, or wrong indices")
    return sorted(choices, key=lambda choice: choice["index"])


def read_positions(choice: dict[str, Any], ids: Sequence[int], first: int, k: int) -> TopTokens:
    """What the server says of one row from the token `first` on, in float32.

    Args:
        choice: one choice of the reply.
        ids: the token ids that were sent.
        first: index of the first token of interest; at least 1, for nothing precedes token 0.
        k: as it was asked for; 0 for the sent tokens alone, -1 for the whole vocabulary.

    Raises:
        ReplyError: it is not exactly what was asked for.
    """
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and echoed != list(ids):
        raise ReplyError("it is about other token ids than were sent")
    entries = part(choice, "prompt_logprobs", list)
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
    sampled = np.array([row[0] for row in rows], dtype=np.float64).reshape(len(rows))
    top_ids = np.array([row[1] for row in rows], dtype=np.int64).reshape(len(rows), k)
    logps = np.array([row[2] for row in rows], dtype=np.float64).reshape(len(rows), k)
    if everything and (np.sort(top_ids, axis=-1) != np.arange(k)).any():
        raise ReplyError("it does not hold the whole vocabulary, which was asked for")
    if np.isnan(sampled).any() or np.isnan(logps).any():
        raise ReplyError("a log-probability is NaN")
    if (sampled > SLACK).any() or (logps > SLACK).any():
        raise ReplyError("a log-probability is above 0")
    if (np.exp(logps).sum(-1) > 1 + SLACK).any():
        raise ReplyError("the probabilities at a position add up to more than 1")
    # What rounding has put above 0 is 0.
    return TopTokens(
        torch.from_numpy(sampled).float().clamp(max=0.0),
        torch.from_numpy(top_ids),
        torch.from_numpy(logps).float().clamp(max=0.0),
    )


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


class Scorer:
    """Asks one served model for the log-probabilities of given tokens, and for its likeliest ones beside them.

    Args:
        client: the server or servers.
        model: the served model's name.
        top_k: how many of the likeliest tokens come back per position: None all, 0 none.

    Attributes:
        k: `top_k` as the server understands it: -1 for the whole vocabulary.
        cache, identity: where answers are kept, and what distinguishes the model there; None asks every time.
        context_tokens: the server's limit of prompt and completion together; None where it is not known.
        vocabulary_size: the width of the student's logits; larger token ids are refused. None refuses none.
    """

    def __init__(self, client: Client, model: str, top_k: int | None) -> None:
        if top_k is not None and top_k < 0:
            raise UserError(
                f"{client.key_prefix}top_k={top_k}: must be at least 0; null stands for the whole vocabulary."
            )
        self.client = client
        self.model = model
        self.top_k = top_k
        self.k = ALL if top_k is None else top_k
        self.cache: ReplyCache | None = None
        self.identity = model
        self.context_tokens: int | None = None
        self.vocabulary_size: int | None = None

    def rows(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[TokenRow]:
        """Prompts and completions, one of each per row, as `score` takes them.

        Raises:
            UserError: a row does not fit into the server's context.
            ValueError: a prompt has no tokens, or the numbers of prompts and completions differ.
        """
        if len(prompt_ids) != len(completion_ids):
            raise ValueError(f"{len(prompt_ids)} prompts for {len(completion_ids)} completions")
        rows = []
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
            if not prompt:
                raise ValueError("a teacher prompt without tokens: nothing precedes the first token to be scored")
            row = TokenRow([int(token) for token in (*prompt, *completion)], len(prompt))
            if self.context_tokens is not None and len(row.ids) >= self.context_tokens and completion:
                raise UserError(
                    f"The teacher's prompt of {len(prompt)} tokens and the completion of {len(completion)} do not fit "
                    f"into the {self.context_tokens} tokens of {self.client.name}'s context, of which one is generated."
                    " Start the server with a longer --max-model-len, or shorten completions or the teacher's context."
                )
            rows.append(row)
        return rows

    async def score(self, rows: Sequence[TokenRow]) -> list[TopTokens]:
        """What the model says of each row's completion."""
        known = [self._known(row) for row in rows]
        missing = [row for row, answer in zip(rows, known, strict=True) if answer is None]
        replies = await all_of(self._ask(batch) for batch in self.batches(missing))
        asked = (answer for reply in replies for answer in reply)
        return [answer if answer is not None else next(asked) for answer in known]

    def batches(self, rows: Sequence[TokenRow]) -> list[list[TokenRow]]:
        """Rows that share a request: few enough that every connection has work, small enough for the server."""
        most = max(1, math.ceil(len(rows) / self.client.max_concurrency))
        batches: list[list[TokenRow]] = []
        tokens = 0
        for row in rows:
            if not batches or len(batches[-1]) >= most or tokens + len(row.ids) > REQUEST_TOKENS:
                batches.append([])
                tokens = 0
            batches[-1].append(row)
            tokens += len(row.ids)
        return batches

    def _known(self, row: TokenRow) -> TopTokens | None:
        """The answer that needs no request."""
        if row.prompt_tokens == len(row.ids):
            return TopTokens.empty(self.top_k or 0)
        stored = self.cache.get(self._key(row)) if self.cache is not None else None
        return None if stored is None else TopTokens(**load(stored))

    def _key(self, row: TokenRow) -> bytes:
        body = scoring_body(self.model, [row.ids], self.k)
        return cache_key(self.identity, "prompt_logprobs", body, row.prompt_tokens)

    async def _ask(self, rows: list[TokenRow]) -> list[TopTokens]:
        answers = await score_rows(self.client, self.model, rows, self.k)
        for row, answer in zip(rows, answers, strict=True):
            largest = int(answer.ids.max()) if answer.ids.numel() else 0
            if self.vocabulary_size is not None and largest >= self.vocabulary_size:
                raise UserError(
                    f"{self.client.name} gives a log-probability to token {largest}; the student's vocabulary has "
                    f"{self.vocabulary_size}. The teacher must have the student's vocabulary, or "
                    f"{self.client.key_prefix}mode=write."
                )
            if self.cache is not None:
                self.cache.put(self._key(row), save(vars(answer)))
        return answers
