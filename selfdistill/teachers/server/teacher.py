"""A teacher behind a server: it scores the student's own tokens, or writes demonstrations.

Scoring goes by token ids: the teacher's prompt and the completion as it was sampled, through vLLM's `prompt_logprobs`.
These are log-probabilities at temperature 1 whatever is asked for, so the student is compared at temperature 1 too.
"""

import concurrent.futures
import math
from collections.abc import Sequence
from typing import Any, Literal

from selfdistill.errors import UserError
from selfdistill.rollout import Prompt
from selfdistill.teachers import templates
from selfdistill.teachers.server import probe as server_probe
from selfdistill.teachers.server.client import Client, RequestRefused, ServerUnavailable, all_of
from selfdistill.teachers.server.prompt_logprobs import ALL, Positions, choices_of, read_positions, scoring_body
from selfdistill.teachers.server.reply_cache import ReplyCache, cache_key, mean_difference
from selfdistill.teachers.server.scored import Scored
from selfdistill.teachers.server.writer import Reward, Sampling, Writer, Written, show_golden

# Bounds what a server holds at once for one request: prompt log-probabilities of the whole vocabulary take much memory.
REQUEST_TOKENS = 2048
START_PATIENCE_S = 5.0
SAME_MODEL_NATS = 0.05


class ServerTeacher:
    """A model served by vLLM (`score`) or by any OpenAI-compatible server (`write`). Nothing is sent before it is used.

    Args:
        base_url: `http://host:port/v1`, or a list of servers of the same model.
        model: the name under which it is served.
        mode: `score` gives log-probabilities of the student's tokens, `write` gives demonstrations.
        context: what the teacher sees beyond the prompt; used by the trainer.
        top_k: how many of the likeliest tokens come back per position: None all, 0 none but the sampled one.
        cache: a folder in which answers are kept; None keeps none.
        samples, temperature, top_p, max_tokens, stop, seed, chat_template_kwargs: how it writes.
        show_golden_response: in `write` mode the golden response is shown, in `golden_template`.
        keep, keep_at_least: a reward, and the score from which on a written response is kept.
        max_concurrency, timeout_s, patience_s, api_key_env: see `Client`.
    """

    served = True

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str,
        *,
        mode: Literal["score", "write"] = "score",
        context: Any = None,
        top_k: int | None = None,
        max_concurrency: int = 8,
        timeout_s: float = 120.0,
        patience_s: float = 300.0,
        api_key_env: str = "OPENAI_API_KEY",
        cache: str | None = None,
        samples: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int = 1024,
        stop: Sequence[str] = (),
        seed: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        show_golden_response: bool = False,
        golden_template: str = templates.DEMONSTRATION,
        keep: Reward | None = None,
        keep_at_least: float = 1.0,
        key_prefix: str = "teacher.",
    ) -> None:
        if mode not in ("score", "write"):
            raise UserError(f"{key_prefix}mode={mode}: write score or write.")
        if top_k is not None and top_k < 0:
            raise UserError(f"{key_prefix}top_k={top_k}: must be at least 0; null stands for the whole vocabulary.")
        self.client = Client(
            [base_url] if isinstance(base_url, str) else list(base_url),
            api_key_env=api_key_env, max_concurrency=max_concurrency, timeout_s=timeout_s, patience_s=patience_s,
            key_prefix=key_prefix,
        )  # fmt: skip
        self.prefix = key_prefix
        self.model = model
        self.mode = mode
        self.context = context
        self.top_k = top_k
        self.context_tokens: int | None = None
        self.vocabulary_size: int | None = None
        self.show_golden_response = show_golden_response
        self.golden_template = golden_template
        self._cache_folder = cache
        self._cache: ReplyCache | None = None
        self._identity: str | None = None
        self._sampling = Sampling(
            samples, temperature, top_p, max_tokens, tuple(stop), seed, dict(chat_template_kwargs or {})
        )  # fmt: skip
        self._keep = keep
        self._keep_at_least = keep_at_least

    @property
    def k(self) -> int:
        """`top_k` as the server understands it: -1 for the whole vocabulary."""
        return ALL if self.top_k is None else self.top_k

    def close(self) -> None:
        """End the connections and the thread."""
        self.client.close()
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def check(
        self,
        tokenizer: server_probe.Tokenizer | None = None,
        *,
        longest_tokens: int | None = None,
        vocabulary_size: int | None = None,
    ) -> list[str]:
        """Ask every server, before training, whether it can do what will be asked of it.

        Args:
            tokenizer: the student's; needed in `score` mode.
            longest_tokens: the most tokens of teacher prompt and completion together.
            vocabulary_size: the width of the student's logits; ids beyond it are refused from here on.

        Returns:
            What was found, a line a server.

        Raises:
            UserError: no server answers; the model is not served; another tokenizer; no prompt log-probabilities, or
                fewer than `top_k`; a context that is too short; servers that serve different models.
        """
        if self.mode == "score" and tokenizer is None:
            raise ValueError("the student's tokenizer is needed to check a teacher that scores")
        self.vocabulary_size = vocabulary_size
        lines, probes, down = [], [], []
        for alone in self.client.each_alone(patience_s=min(START_PATIENCE_S, self.client.patience_s)):
            with alone:
                try:
                    line, probe = alone.run(self._check_one(alone, tokenizer, longest_tokens))
                except ServerUnavailable as error:
                    down.append(error)
                    lines.append(f"{alone.name} does not answer; it is left out until it does")
                    continue
            lines.append(line)
            probes.append(probe)
        if len(down) == len(lines):
            raise down[0]
        for other in probes[1:]:
            if mean_difference(probes[0], other) > SAME_MODEL_NATS:
                raise UserError(
                    f"{self.prefix}base_url: the servers serve different models as {self.model}: the same tokens get other "
                    "log-probabilities. Start all of them with the same weights."
                )
        return lines

    def check_length(self, longest_tokens: int) -> None:
        """Raises UserError where teacher prompt and completion of so many tokens together do not fit into the context."""
        # The server generates at least one token after what it scores.
        if self.context_tokens is not None and longest_tokens >= self.context_tokens:
            raise UserError(
                f"{self.client.name} serves {self.model} with a context of {self.context_tokens} tokens; the teacher's prompt "
                f"and a completion can take {longest_tokens}, and one more is needed. Start it with --max-model-len "
                f"{longest_tokens + 1}, or shorten the completions (rollout.max_completion_tokens) or what the teacher is shown."
            )

    async def _check_one(self, client: Client, tokenizer: Any, longest_tokens: int | None) -> tuple[str, list[float]]:
        served = await server_probe.find_model(client, self.model)
        self.context_tokens = min(filter(None, [served.context_tokens, self.context_tokens]), default=None)
        if longest_tokens is not None:
            self.check_length(longest_tokens)
        line = f"{client.name} serves {self.model}, context {served.context_tokens or 'unknown'} tokens"
        if self.mode == "write":
            return line, []
        differences = await server_probe.tokenizer_differences(client, self.model, tokenizer)
        if differences:
            raise UserError(
                f"{client.name} serves {self.model} with another tokenizer than the student's: {'; '.join(differences)}. "
                f"Token-level distillation needs the same one. {self.prefix}mode=write needs no common tokenizer: the "
                "server then writes demonstrations as text."
            )
        probe = await server_probe.require_scoring(client, self.model, self.k)
        return (
            f"{line}, the student's tokenizer, {self.top_k if self.top_k is not None else 'all'} log-probabilities",
            probe,
        )

    # Scoring.

    def score(
        self, teacher_prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[Scored]:
        """What the teacher says of each completion after its prompt; waits for it. See `score_async`."""
        return self.score_async(teacher_prompt_ids, completion_ids).result()

    def score_async(
        self, teacher_prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> "concurrent.futures.Future[list[Scored]]":
        """Start scoring and return at once.

        Args:
            teacher_prompt_ids: what the teacher sees, a list of at least one token id per completion.
            completion_ids: the sampled ids, end-of-sequence included where it was sampled; may be empty.

        Returns:
            A future of one `Scored` per completion.

        Raises:
            UserError: a row does not fit into the server's context.
        """
        if len(teacher_prompt_ids) != len(completion_ids):
            raise ValueError(f"{len(teacher_prompt_ids)} prompts for {len(completion_ids)} completions")
        rows = []
        for prompt, completion in zip(teacher_prompt_ids, completion_ids, strict=True):
            if not prompt:
                raise ValueError("a teacher prompt without tokens: nothing precedes the first token to be scored")
            row = [int(token) for token in (*prompt, *completion)]
            if self.context_tokens is not None and len(row) >= self.context_tokens and completion:
                raise UserError(
                    f"The teacher's prompt of {len(prompt)} tokens and the completion of {len(completion)} do not fit into "
                    f"the {self.context_tokens} tokens of {self.client.name}'s context, of which one is generated. Start the "
                    f"server with a longer --max-model-len, or shorten completions or the teacher's context."
                )
            rows.append((row, len(prompt)))
        return self.client.submit(self._score(rows))

    async def _score(self, rows: list[tuple[list[int], int]]) -> list[Scored]:
        identity = await self._model_identity() if self._cache_folder is not None else None
        results: list[Scored | None] = [None] * len(rows)
        missing: list[tuple[int, bytes]] = []
        for index, (row, first) in enumerate(rows):
            if len(row) == first:
                results[index] = Scored.empty(self.top_k or 0)
                continue
            key, stored = b"", None
            if self._cache is not None:
                key = cache_key(identity, "completions", scoring_body(self.model, [row], self.k), first)
                stored = self._cache.get(key)
            if stored is not None:
                results[index] = Scored.unpack(stored)
            else:
                missing.append((index, key))
        await all_of(self._score_batch(rows, batch, results) for batch in self._batches(rows, missing))
        return [result for result in results if result is not None]

    def _batches(
        self, rows: list[tuple[list[int], int]], missing: list[tuple[int, bytes]]
    ) -> list[list[tuple[int, bytes]]]:
        """Rows that share a request: few enough that every connection has work, small enough for the server."""
        most = max(1, math.ceil(len(missing) / self.client.max_concurrency))
        batches: list[list[tuple[int, bytes]]] = []
        tokens = 0
        for item in missing:
            length = len(rows[item[0]][0])
            if not batches or len(batches[-1]) >= most or tokens + length > REQUEST_TOKENS:
                batches.append([])
                tokens = 0
            batches[-1].append(item)
            tokens += length
        return batches

    async def _score_batch(
        self, rows: list[tuple[list[int], int]], batch: list[tuple[int, bytes]], results: list[Scored | None]
    ) -> None:
        sent = [rows[index] for index, _ in batch]

        def decode(reply: Any) -> list[Positions]:
            choices = choices_of(reply, len(sent))
            return [
                read_positions(choice, row, first, self.k) for choice, (row, first) in zip(choices, sent, strict=True)
            ]

        body = scoring_body(self.model, [row for row, _ in sent], self.k)
        for (index, key), positions in zip(batch, await self._ask(body, decode), strict=True):
            results[index] = scored = Scored.of(positions)
            if (
                self.vocabulary_size is not None
                and scored.top_ids.numel()
                and int(scored.top_ids.max()) >= self.vocabulary_size
            ):
                raise UserError(
                    f"{self.client.name} gives a log-probability to token {int(scored.top_ids.max())}; the student's vocabulary "
                    f"has {self.vocabulary_size}. The teacher must have the student's vocabulary, or {self.prefix}mode=write."
                )
            if self._cache is not None:
                self._cache.put(key, scored.pack())

    async def _ask(self, body: dict[str, Any], decode: Any) -> list[Positions]:
        try:
            return await self.client.request("POST", "completions", body, decode)
        except RequestRefused as error:
            limit = server_probe.named_limit(error.detail)
            if limit is None:
                raise
            raise UserError(
                f"{error}\n{self.prefix}top_k={self.top_k} is above the server's limit: write {self.prefix}top_k={limit} or "
                f"less, or start it with a larger --max-logprobs."
            ) from None

    # Writing.

    def write(
        self,
        prompts: Sequence[Prompt],
        golden: Sequence[Sequence[str]] | None = None,
        columns: Sequence[dict[str, Any]] | None = None,
    ) -> list[list[str]]:
        """Demonstrations for each prompt; none where none was worth keeping. Waits for them. See `write_async`."""
        return [written.kept for written in self.write_async(prompts, golden, columns).result()]

    def write_async(
        self,
        prompts: Sequence[Prompt],
        golden: Sequence[Sequence[str]] | None = None,
        columns: Sequence[dict[str, Any]] | None = None,
    ) -> "concurrent.futures.Future[list[Written]]":
        """Start writing and return at once.

        Args:
            prompts: strings or conversations.
            golden: golden responses of each prompt, shown to the server when `show_golden_response` is set.
            columns: what the reward `keep` gets of each prompt besides the prompt, such as `answer`.
        """
        if golden is not None and len(golden) != len(prompts):
            raise ValueError(f"{len(golden)} golden responses for {len(prompts)} prompts")
        shown = list(prompts)
        if golden is not None and self.show_golden_response:
            shown = [show_golden(p, g, self.golden_template) if g else p for p, g in zip(prompts, golden, strict=True)]
        return self.client.submit(self._write(shown, columns))

    async def _write(self, prompts: list[Prompt], columns: Sequence[dict[str, Any]] | None) -> list[Written]:
        identity = await self._model_identity() if self._cache_folder is not None else None
        writer = Writer(
            self.client, self.model, self._sampling, cache=self._cache, identity=identity, keep=self._keep,
            keep_at_least=self._keep_at_least,
        )  # fmt: skip
        return await writer.write(prompts, columns)

    async def _model_identity(self) -> str:
        """What the cache knows the model by: what the server says of it and, when it scores, how it answers a probe.

        A model trained further and served under the same name and path is another one.
        """
        if self._identity is None:
            assert self._cache_folder is not None
            cache = ReplyCache(self._cache_folder)
            served = await server_probe.find_model(self.client, self.model)
            identity = served.identity
            if self.mode == "score":
                probe = await server_probe.require_scoring(self.client, self.model, 0)
                identity += f"|{cache.generation(served.identity, probe)}"
            self._cache, self._identity = cache, identity
        return self._identity
