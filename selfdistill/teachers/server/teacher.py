"""A teacher behind a server: it scores the student's own tokens, or writes demonstrations.

Scoring goes by token ids: the teacher's prompt and the completion as it was sampled, through vLLM's `prompt_logprobs`.
These are log-probabilities at temperature 1 whatever is asked for, so the student is compared at temperature 1 too.
"""

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, TypeVar

import anyio
from torch import nn

from selfdistill.errors import UserError
from selfdistill.losses import TopTokens
from selfdistill.rollout import Prompt
from selfdistill.teachers import templates
from selfdistill.teachers.context import Context, NoContext
from selfdistill.teachers.interface import BaseTeacher, TeacherRequest
from selfdistill.teachers.language import Speaker
from selfdistill.teachers.server import probe
from selfdistill.teachers.server.client import Client, ServerUnavailable
from selfdistill.teachers.server.prompt_logprobs import Scorer
from selfdistill.teachers.server.reply_cache import ReplyCache, mean_difference
from selfdistill.teachers.server.writing import Sampling, Writer, Written, show_golden

T = TypeVar("T")

SAME_MODEL_NATS = 0.05


class ServerTeacher(BaseTeacher, AbstractContextManager["ServerTeacher"]):
    """A model served by vLLM (`score`) or by any OpenAI-compatible server (`write`). Nothing is sent before it is used.

    It holds a thread and connections from its first request on: whoever builds it calls `close`, or uses it in `with`.

    Args:
        base_url: `http://host:port/v1`, or a list of servers of the same model.
        model: the name under which it is served.
        mode: `score` gives log-probabilities of the student's tokens, `write` gives demonstrations.
        context: what the teacher sees beyond the prompt, one of `selfdistill.teachers.context`; nothing by default.
        top_k: how many of the likeliest tokens come back per position: None all, 0 none but the sampled one.
        cache: a folder in which answers are kept; None keeps none.
        samples, temperature, top_p, max_tokens, stop, seed: how it writes, see `Sampling`.
        chat_template_kwargs: what its chat template is rendered with, where it writes by the server and where it
            scores here; None for what the student's is rendered with (when writing: for nothing).
        show_golden_response: in `write` mode the golden response is shown, in `golden_template`.
        keep, keep_at_least: a reward, and the score from which on a written response is kept.
        max_concurrency, timeout_s, patience_s, api_key_env, key_prefix: see `Client`.

    Attributes:
        client, scorer, writer: the parts that send requests, score and write.

    Raises:
        UserError: a setting is out of its range.
    """

    served = True

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str,
        *,
        mode: Literal["score", "write"] = "score",
        context: Context | None = None,
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
        keep: Callable[..., Any] | None = None,
        keep_at_least: float = 1.0,
        key_prefix: str = "teacher.",
    ) -> None:
        if mode not in ("score", "write"):
            raise UserError(f"{key_prefix}mode={mode}: write score or write.")
        self.model = model
        self.mode = mode
        self.context = context if context is not None else NoContext()
        self.client = Client(
            base_url,
            api_key_env=api_key_env,
            max_concurrency=max_concurrency,
            timeout_s=timeout_s,
            patience_s=patience_s,
            key_prefix=key_prefix,
        )
        self.scorer = Scorer(self.client, model, top_k)
        self.chat_template_kwargs = chat_template_kwargs
        sampling = Sampling(samples, temperature, top_p, max_tokens, stop, seed, dict(chat_template_kwargs or {}))
        self.writer = Writer(self.client, model, sampling, keep=keep, keep_at_least=keep_at_least)
        self.golden_template = golden_template if show_golden_response else None
        self._cache_folder = cache
        self._cache_opening = anyio.Lock()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections, the thread and the cache. A later request starts them anew."""
        self.client.close()
        if self.scorer.cache is not None:
            self.scorer.cache.close()
            self.scorer.cache = self.writer.cache = None

    def check(
        self,
        tokenizer: probe.Tokenizer | None = None,
        *,
        vocabulary_size: int | None = None,
        longest_tokens: int | None = None,
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
        self.scorer.vocabulary_size = vocabulary_size
        lines, answers, down = [], [], []
        for alone in self.client.each_alone(patience_s=self.client.start_patience_s):
            with alone:
                try:
                    line, answer = alone.run(self._check_one(alone, tokenizer, longest_tokens))
                except ServerUnavailable as error:
                    down.append(error)
                    lines.append(f"{alone.name} does not answer; it is left out until it does")
                    continue
            lines.append(line)
            answers.append(answer)
        if len(down) == len(lines):
            raise down[0]
        for other in answers[1:]:
            if mean_difference(answers[0], other) > SAME_MODEL_NATS:
                raise UserError(
                    f"{self.client.key_prefix}base_url: the servers serve different models as {self.model}: the same "
                    "tokens get other log-probabilities. Start all of them with the same weights."
                )
        return lines

    def compare(self, student: Speaker) -> list[str]:
        """As far as the servers say; what writes demonstrations may speak as it likes, for only its text is used."""
        if self.mode == "write":
            return []
        kwargs, found = self.template_kwargs(student.template_kwargs), super().compare(student)
        for alone in self.client.each_alone(patience_s=self.client.start_patience_s):
            with alone:
                found += alone.run(probe.compare(alone, self.model, student, kwargs))
        return list(dict.fromkeys(found))

    def check_length(self, longest_tokens: int) -> None:
        """Compare the most tokens of teacher prompt and completion together with the server's context.

        Raises:
            UserError: they do not fit.
        """
        if self.scorer.context_tokens is not None:
            probe.require_context(self.client, self.model, self.scorer.context_tokens, longest_tokens)

    async def _check_one(
        self, client: Client, tokenizer: probe.Tokenizer | None, longest_tokens: int | None
    ) -> tuple[str, list[float]]:
        """What was found of one server, and the log-probabilities that it gives the probe's tokens."""
        served = await probe.find_model(client, self.model)
        limits = [limit for limit in (served.context_tokens, self.scorer.context_tokens) if limit]
        self.scorer.context_tokens = min(limits, default=None)
        if longest_tokens is not None:
            self.check_length(longest_tokens)
        line = f"{client.name} serves {self.model}, context {served.context_tokens or 'unknown'} tokens"
        if self.mode == "write" or tokenizer is None:
            return line, []
        await probe.require_tokenizer(client, self.model, tokenizer)
        answer = await probe.require_scoring(client, self.model, self.scorer.k)
        top_k = "all" if self.scorer.top_k is None else self.scorer.top_k
        return f"{line}, the student's tokenizer, {top_k} log-probabilities", answer

    @property
    def context_tokens(self) -> int | None:
        return self.scorer.context_tokens

    # Scoring.

    def prepare(self, requests: Sequence[TeacherRequest]) -> None:
        """Starts scoring, in this order, what has not been asked for yet, and returns at once.

        The server works on the later ones while the student learns from the first. Raises as `score_async`.
        """
        for request in requests:
            if request.answer is None:
                distilled = request.keep.any(dim=1).tolist()
                rows = [row for row, wanted in zip(request.sent(), distilled, strict=True) if wanted]
                request.answer = self.score_async([prompt for prompt, _ in rows], [ids for _, ids in rows])

    def say(self, request: TeacherRequest, student: nn.Module) -> TopTokens:
        """What the server says of the distilled tokens; waits for it.

        Raises:
            ServerUnavailable, MalformedReply, UserError: as `Client.request` and `score_async`.
        """
        self.prepare([request])
        assert request.answer is not None
        keep = [row for row in request.keep.cpu() if row.any()]
        return TopTokens.concatenated(request.answer.result(), keep).to(request.keep.device)

    def score(
        self, teacher_prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[TopTokens]:
        """What the teacher says of each completion after its prompt; waits for it. See `score_async`."""
        return self.score_async(teacher_prompt_ids, completion_ids).result()

    def score_async(
        self, teacher_prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> "Future[list[TopTokens]]":
        """Start scoring and return at once.

        Args:
            teacher_prompt_ids: what the teacher sees, a list of at least one token id per completion.
            completion_ids: the sampled ids, end-of-sequence included where it was sampled; may be empty.

        Returns:
            A future of one `TopTokens` per completion.

        Raises:
            UserError: a row does not fit into the server's context.
        """
        rows = self.scorer.rows(teacher_prompt_ids, completion_ids)
        return self.client.submit(self._with_cache(partial(self.scorer.score, rows)))

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
    ) -> "Future[list[Written]]":
        """Start writing and return at once.

        Args:
            prompts: strings or conversations.
            golden: golden responses of each prompt, shown to the server when `show_golden_response` is set.
            columns: what the reward `keep` gets of each prompt besides the prompt, such as `answer`.
        """
        prompts, template = list(prompts), self.golden_template
        if golden is not None and template is not None:
            prompts = [show_golden(p, g, template) if g else p for p, g in zip(prompts, golden, strict=True)]
        return self.client.submit(self._with_cache(partial(self.writer.write, prompts, columns)))

    async def _with_cache(self, work: Callable[[], Awaitable[T]]) -> T:
        await self._open_cache()
        return await work()

    async def _open_cache(self) -> None:
        """Open the cache, once, for the model as the server has it now.

        The cache knows the model by what the server says of it and, when it scores, by how it answers a probe: a model
        trained further and served under the same name and path is another one.
        """
        async with self._cache_opening:
            if self._cache_folder is None or self.scorer.cache is not None:
                return
            identity = (await probe.find_model(self.client, self.model)).identity
            answer = await probe.require_scoring(self.client, self.model, 0) if self.mode == "score" else None
            cache = ReplyCache(self._cache_folder)
            if answer is not None:
                identity += f"|{cache.generation(identity, answer)}"
            self.scorer.identity = self.writer.identity = identity
            self.scorer.cache = self.writer.cache = cache
