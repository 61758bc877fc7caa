"""Responses that a server writes to prompts through chat completions; any OpenAI-compatible server, any tokenizer."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfdistill.limits import check_limits, number
from selfdistill.rewards.result import normalise
from selfdistill.rollout import Message, Prompt
from selfdistill.teachers.context import without_thinking
from selfdistill.teachers.server.client import Client, ReplyError, all_of, part
from selfdistill.teachers.server.reply_cache import ReplyCache, cache_key
from selfdistill.teachers.templating import Template, fill_last_user_turn
from selfdistill.text import whole_characters

CUT_OFF, EMPTY, DISLIKED = "cut off at max_tokens", "empty", "not accepted by the reward"


@dataclass(frozen=True)
class Sampling:
    """How the server writes.

    Attributes:
        samples: responses asked for per prompt.
        max_tokens: the longest response; longer ones are cut off there and not kept.
        stop: texts at which a response ends.
        seed: makes a server's sampling repeatable where it supports that.
        chat_template_kwargs: passed to the chat template, such as `{enable_thinking: false}` (vLLM).

    Raises:
        UserError: a number is out of its range.
    """

    samples: int = field(default=1, metadata=number(1))
    temperature: float = field(default=1.0, metadata=number(0))
    top_p: float = field(default=1.0, metadata=number(above=0, high=1))
    max_tokens: int = field(default=1024, metadata=number(1))
    stop: Sequence[str] = ()
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_limits(Sampling, vars(self), lambda name: f"{name}={vars(self)[name]}")

    def body(self, model: str, messages: list[Message]) -> dict[str, Any]:
        """The request body, without the number of responses and the seed."""
        body: dict[str, Any] = {"model": model, "messages": messages, "temperature": self.temperature}
        body |= {"top_p": self.top_p, "max_tokens": self.max_tokens}
        if self.stop:
            body["stop"] = list(self.stop)
        if self.chat_template_kwargs:
            body["chat_template_kwargs"] = dict(self.chat_template_kwargs)
        return body


@dataclass(frozen=True)
class Written:
    """What came of one prompt: the responses kept, and those that were not, each with the reason."""

    kept: list[str]
    rejected: list[tuple[str, str]]


def show_golden(prompt: Prompt, golden: Sequence[str], template: str) -> Prompt:
    """The prompt with golden responses shown, joined by newlines; a conversation has them in its last user turn.

    Raises:
        UserError: the template is not one with {prompt} and {demonstration}, or there is no user turn.
    """
    slots = Template(template, key="golden_template", slots=("prompt", "demonstration"))
    return fill_last_user_turn(prompt, slots, demonstration="\n".join(golden))


@dataclass
class Writer:
    """Writes responses to prompts and keeps the ones worth keeping.

    Attributes:
        client: the server or servers.
        model: the served model's name.
        sampling: how it writes.
        cache: where answers are kept; None asks every time.
        identity: what distinguishes the model in the cache; its name by default.
        keep: a reward; a response is kept when its score is at least `keep_at_least`. It is called as in training, with
            empty `completion_ids`, since the server's tokens are not the student's.
    """

    client: Client
    model: str
    sampling: Sampling
    cache: ReplyCache | None = None
    identity: str | None = None
    keep: Callable[..., Any] | None = None
    keep_at_least: float = 1.0

    async def write_one(self, prompt: Prompt, columns: dict[str, Any] | None = None) -> Written:
        """Responses to one prompt, without their thinking.

        Args:
            prompt: a string, which becomes a user's turn, or a conversation.
            columns: what the reward gets besides prompt and completion, such as `answer`.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        choices: list[tuple[str, bool]] = []
        while len(choices) < self.sampling.samples:  # some servers give one response whatever n is
            choices += await self._ask(messages, self.sampling.samples - len(choices), len(choices))
        kept: list[str] = []
        rejected: list[tuple[str, str]] = []
        for text, complete in choices:
            text = without_thinking(text, "<think>")
            reason = CUT_OFF if not complete else EMPTY if not text.strip() else None
            if reason is None and not self._is_liked(prompt, text, columns or {}):
                reason = DISLIKED
            if reason:
                rejected.append((text, reason))
            else:
                kept.append(text)
        return Written(kept, rejected)

    async def write(self, prompts: Sequence[Prompt], columns: Sequence[dict[str, Any]] | None = None) -> list[Written]:
        """Responses to every prompt, in their order; as many requests at once as the client allows."""
        each = columns if columns is not None else [{}] * len(prompts)
        return await all_of(self.write_one(p, c) for p, c in zip(prompts, each, strict=True))

    async def _ask(self, messages: list[Message], count: int, already: int) -> list[tuple[str, bool]]:
        """At least one and at most `count` responses, each with whether it is complete."""
        body = {**self.sampling.body(self.model, messages), "n": count}
        if self.sampling.seed is not None:
            body["seed"] = self.sampling.seed + already
        key = cache_key(self.identity or self.model, "chat/completions", body, already)
        stored = self.cache.get(key) if self.cache is not None else None
        if stored is not None:
            return [(text, complete) for text, complete in json.loads(stored)]
        choices = (await self.client.request("POST", "chat/completions", body, _read_choices))[:count]
        if self.cache is not None:
            self.cache.put(key, json.dumps(choices).encode())
        return choices

    def _is_liked(self, prompt: Prompt, text: str, columns: dict[str, Any]) -> bool:
        """Whether the reward, if there is one, accepts a response."""
        if self.keep is None:
            return True
        completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        given = {name: [value] for name, value in columns.items()}
        result = self.keep(prompts=[prompt], completions=[completion], completion_ids=[[]], **given)
        (score,), _ = normalise(result, "keep", 1)
        return score is not None and score >= self.keep_at_least


def _read_choices(reply: Any) -> list[tuple[str, bool]]:
    """Text and completeness of every choice of a chat completion."""
    choices = part(reply, "choices", list)
    if not choices:
        raise ReplyError("it has no choices")
    read = []
    for choice in choices:
        message = part(choice, "message", dict)
        text = "" if message.get("content") is None else part(message, "content", str)
        read.append((whole_characters(text), choice.get("finish_reason") != "length"))
    return read
