"""A served teacher: reachable, model, tokenizer, prompt log-probabilities, largest k, context length, latency."""

import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig

from selfdistill.errors import UserError
from selfdistill.machine.findings import Line, error, ok, warning
from selfdistill.teachers.server import probe as server_probe
from selfdistill.teachers.server.client import Client
from selfdistill.teachers.server.prompt_logprobs import ALL

LATENCY_REQUESTS = 5
SLOW_S = 2.0


@dataclass(frozen=True)
class ServedTeacher:
    """What the checks need of the composed group `teacher`.

    Attributes:
        base_urls: the addresses of the servers.
        model: the name under which the model is served.
        mode: whether it scores the student's tokens or writes demonstrations.
        top_k: log-probabilities wanted for each token; None for the whole vocabulary.
        api_key_env: the environment variable with the key.
    """

    base_urls: tuple[str, ...]
    model: str
    mode: Literal["score", "write"]
    top_k: int | None
    api_key_env: str
    timeout_s: float

    @classmethod
    def of(cls, teacher: DictConfig) -> "ServedTeacher":
        """From the composed group `teacher`."""
        urls = (teacher.base_url,) if isinstance(teacher.base_url, str) else tuple(teacher.base_url)
        return cls(urls, teacher.model, teacher.mode, teacher.top_k, teacher.api_key_env, teacher.timeout_s)


def check_server(
    teacher: ServedTeacher, tokenizer: server_probe.Tokenizer | str, longest_tokens: int | None
) -> list[Line]:
    """Lines for every address of the teacher.

    Args:
        tokenizer: the student's, or the reason why it cannot be loaded.
        longest_tokens: the most tokens of prompt and completion, where it is known.
    """
    lines: list[Line] = []
    try:
        client = Client(
            list(teacher.base_urls),
            api_key_env=teacher.api_key_env,
            timeout_s=teacher.timeout_s,
            patience_s=3.0,
            key_prefix="teacher.",
        )
    except UserError as problem:
        return [error("teacher", str(problem), "correct the address")]
    for alone in client.each_alone():
        with alone:
            lines += alone.run(_check_one(alone, teacher, tokenizer, longest_tokens))
    return lines


def _found_and_advice(problem: UserError) -> tuple[str, str]:
    """The first line of a message is what was found, the others are what to do."""
    found, _, advice = str(problem).partition("\n")
    return found, advice.replace("\n", " ") or "see above"


async def _check_one(
    client: Client, teacher: ServedTeacher, tokenizer: server_probe.Tokenizer | str, longest_tokens: int | None
) -> list[Line]:
    try:
        models = await server_probe.served_models(client)
    except UserError as problem:
        return [error("teacher", *_found_and_advice(problem))]
    names = ", ".join(model.name for model in models) or "nothing"
    lines = [ok("teacher", f"{client.name} answers and serves {names}")]
    try:
        served = await server_probe.find_model(client, teacher.model)
    except UserError as problem:
        return [*lines, error("teacher.model", str(problem), f"write teacher.model= with one of: {names}")]
    lines.append(_context_line(served, longest_tokens))
    if teacher.mode == "write":
        return [*lines, await _writing_latency(client, teacher)]
    lines.append(await _tokenizer_line(client, teacher, tokenizer))
    return [*lines, *await _scoring_lines(client, teacher, tokenizer)]


def _context_line(served: server_probe.ServedModel, longest_tokens: int | None) -> Line:
    if served.context_tokens is None:
        return warning("context", "the server does not say how long", "see to it that prompt and completion fit")
    found = f"{served.context_tokens} tokens"
    if longest_tokens is not None and longest_tokens >= served.context_tokens:
        needed = longest_tokens + 1
        return error(
            "context", f"{found}; the run can need {needed}", f"start the server with --max-model-len {needed}"
        )
    return ok("context", found)


async def _tokenizer_line(client: Client, teacher: ServedTeacher, tokenizer: server_probe.Tokenizer | str) -> Line:
    if isinstance(tokenizer, str):
        return warning("tokenizer", f"not compared: {tokenizer}", "write model= as for training")
    try:
        differences = await server_probe.tokenizer_differences(client, teacher.model, tokenizer)
    except UserError as problem:
        return error("tokenizer", *_found_and_advice(problem))
    if differences:
        advice = "serve a model with the student's tokenizer, or write teacher.mode=write, which needs no common one"
        return error("tokenizer", f"another than the student's: {'; '.join(differences)}", advice)
    return ok("tokenizer", f"the student's, {len(tokenizer)} tokens compared")


async def _scoring_lines(client: Client, teacher: ServedTeacher, tokenizer: server_probe.Tokenizer | str) -> list[Line]:
    wanted = teacher.top_k if teacher.top_k is not None else ALL
    try:
        await server_probe.require_scoring(client, teacher.model, 0)  # also warms the server up
        found = "of the prompt"
        if not isinstance(tokenizer, str):
            largest = await server_probe.largest_k(client, teacher.model, len(tokenizer))
            found += f"; at most {largest} a token{' (all)' if largest >= len(tokenizer) else ''}"
        await server_probe.require_scoring(client, teacher.model, wanted)
    except UserError as problem:
        return [error("log-probabilities", *_found_and_advice(problem))]
    latency = await _latency(lambda: server_probe.score_ids(client, teacher.model, server_probe.PROBE_IDS, wanted))
    return [ok("log-probabilities", found), latency]


async def _writing_latency(client: Client, teacher: ServedTeacher) -> Line:
    body = {"model": teacher.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    return await _latency(lambda: client.request("POST", "chat/completions", body))


async def _latency(ask: Callable[[], Awaitable[Any]]) -> Line:
    """The median time of a small request, one after the other."""
    times = []
    try:
        for _ in range(LATENCY_REQUESTS):
            started = time.monotonic()
            await ask()
            times.append(time.monotonic() - started)
    except UserError as problem:
        return error("latency", *_found_and_advice(problem))
    median = statistics.median(times)
    found = f"{median * 1000:.0f} ms for a small request"
    if median > SLOW_S:
        return warning("latency", found, "the server is busy or far away; a larger teacher.max_concurrency may help")
    return ok("latency", found)
