"""Log-probabilities of given tokens from a served model: rows share requests, and answers come from the cache first."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from selfdistill.errors import UserError
from selfdistill.losses import TopTokens
from selfdistill.teachers.server.client import Client, RequestRefused, all_of
from selfdistill.teachers.server.probe import named_limit
from selfdistill.teachers.server.prompt_logprobs import ALL, choices_of, read_positions, scoring_body
from selfdistill.teachers.server.reply_cache import ReplyCache, cache_key

# Bounds what a server holds at once for one request: prompt log-probabilities of the whole vocabulary take much memory.
REQUEST_TOKENS = 2048


class Row(NamedTuple):
    """A prompt and its completion as one list of token ids."""

    ids: list[int]
    prompt_tokens: int


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

    def rows(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Row]:
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
            row = Row([int(token) for token in (*prompt, *completion)], len(prompt))
            if self.context_tokens is not None and len(row.ids) >= self.context_tokens and completion:
                raise UserError(
                    f"The teacher's prompt of {len(prompt)} tokens and the completion of {len(completion)} do not fit "
                    f"into the {self.context_tokens} tokens of {self.client.name}'s context, of which one is generated."
                    " Start the server with a longer --max-model-len, or shorten completions or the teacher's context."
                )
            rows.append(row)
        return rows

    async def score(self, rows: Sequence[Row]) -> list[TopTokens]:
        """What the model says of each row's completion."""
        known = [self._known(row) for row in rows]
        missing = [row for row, answer in zip(rows, known, strict=True) if answer is None]
        replies = await all_of(self._ask(batch) for batch in self.batches(missing))
        asked = (answer for reply in replies for answer in reply)
        return [answer if answer is not None else next(asked) for answer in known]

    def batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows that share a request: few enough that every connection has work, small enough for the server."""
        most = max(1, math.ceil(len(rows) / self.client.max_concurrency))
        batches: list[list[Row]] = []
        tokens = 0
        for row in rows:
            if not batches or len(batches[-1]) >= most or tokens + len(row.ids) > REQUEST_TOKENS:
                batches.append([])
                tokens = 0
            batches[-1].append(row)
            tokens += len(row.ids)
        return batches

    def _known(self, row: Row) -> TopTokens | None:
        """The answer that needs no request."""
        if row.prompt_tokens == len(row.ids):
            return TopTokens.empty(self.top_k or 0)
        stored = self.cache.get(self._key(row)) if self.cache is not None else None
        return None if stored is None else _unpacked(stored)

    def _key(self, row: Row) -> bytes:
        body = scoring_body(self.model, [row.ids], self.k)
        return cache_key(self.identity, "completions", body, row.prompt_tokens)

    async def _ask(self, rows: list[Row]) -> list[TopTokens]:
        def decode(reply: Any) -> list[TopTokens]:
            choices = choices_of(reply, len(rows))
            return [read_positions(choice, *row, self.k) for choice, row in zip(choices, rows, strict=True)]

        body = scoring_body(self.model, [row.ids for row in rows], self.k)
        key = self.client.key_prefix
        try:
            answers = await self.client.request("POST", "completions", body, decode)
        except RequestRefused as error:
            limit = named_limit(error.detail)
            if limit is None:
                raise
            raise UserError(
                f"{error}\n{key}top_k={self.top_k} is above the server's limit: write {key}top_k={limit} or less, or "
                "start it with a larger --max-logprobs."
            ) from None
        for row, answer in zip(rows, answers, strict=True):
            largest = int(answer.ids.max()) if answer.ids.numel() else 0
            if self.vocabulary_size is not None and largest >= self.vocabulary_size:
                raise UserError(
                    f"{self.client.name} gives a log-probability to token {largest}; the student's vocabulary has "
                    f"{self.vocabulary_size}. The teacher must have the student's vocabulary, or {key}mode=write."
                )
            if self.cache is not None:
                self.cache.put(self._key(row), _packed(answer))
        return answers


def _packed(answer: TopTokens) -> bytes:
    """As bytes for the cache."""
    buffer = io.BytesIO()
    ids = answer.ids.numpy().astype(np.int32)
    np.savez(buffer, logprobs=answer.sampled_logps.numpy(), top_ids=ids, top_logprobs=answer.logps.numpy())
    return buffer.getvalue()


def _unpacked(stored: bytes) -> TopTokens:
    with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
        logps, ids, top_logps = (torch.from_numpy(arrays[name]) for name in ("logprobs", "top_ids", "top_logprobs"))
    return TopTokens(logps, ids.long(), top_logps)
