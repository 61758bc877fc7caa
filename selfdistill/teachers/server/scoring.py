"""Log-probabilities of given tokens from a served model: rows share requests, and answers come from the cache first."""

import math
from collections.abc import Sequence

from safetensors.torch import load, save

from selfdistill.errors import UserError
from selfdistill.losses import TopTokens
from selfdistill.teachers.server.client import Client, all_of
from selfdistill.teachers.server.prompt_logprobs import ALL, TokenRow, score_rows, scoring_body
from selfdistill.teachers.server.reply_cache import ReplyCache, cache_key

# Bounds what a server holds at once for one request: prompt log-probabilities of the whole vocabulary take much memory.
REQUEST_TOKENS = 2048


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
