"""A served teacher: reachable, model, tokenizer, prompt log-probabilities, largest k, context length, latency."""

import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from selfdistill.errors import UserError
from selfdistill.machine.findings import Line, error, ok, warning
from selfdistill.teachers.server import ServerTeacher, probe
from selfdistill.teachers.server.client import Client
from selfdistill.teachers.server.prompt_logprobs import score_rows

LATENCY_REQUESTS = 5
SLOW_S = 2.0
PATIENCE_S = 3.0


def check_server(
    teacher: ServerTeacher, tokenizer: probe.Tokenizer | str, longest_tokens: int | None = None
) -> list[Line]:
    """Lines for every address of the teacher.

    Args:
        tokenizer: the student's, or the reason why it cannot be loaded.
        longest_tokens: the most tokens of prompt and completion, where it is known.
    """
    lines: list[Line] = []
    for client in teacher.client.each_alone(patience_s=PATIENCE_S):
        with client:
            client.run(_check_one(client, teacher, tokenizer, longest_tokens, lines))
    return lines


@contextmanager
def _refusal_as_line(what: str, lines: list[Line]) -> Iterator[None]:
    """A UserError inside becomes a line: the first line of its message is what was found, the others are advice."""
    try:
        yield
    except UserError as problem:
        found, _, advice = str(problem).partition("\n")
        lines.append(error(what, found, advice.replace("\n", " ")))


async def _check_one(
    client: Client,
    teacher: ServerTeacher,
    tokenizer: probe.Tokenizer | str,
    longest_tokens: int | None,
    lines: list[Line],
) -> None:
    """Adds the lines of one address."""
    model, k = teacher.model, teacher.scorer.k
    with _refusal_as_line("teacher", lines):
        served = await probe.find_model(client, model)
        lines.append(ok("teacher", f"{client.name} answers and serves {model}"))
    if lines[-1].state == "error":
        return

    with _refusal_as_line("context", lines):
        if served.context_tokens is None:
            lines.append(warning("context", "the server does not say how long", "check that prompt and completion fit"))
        else:
            probe.require_context(client, model, served.context_tokens, longest_tokens or 0)
            lines.append(ok("context", f"{served.context_tokens} tokens"))

    if teacher.mode == "write":
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        with _refusal_as_line("latency", lines):
            lines.append(await _latency(lambda: client.request("POST", "chat/completions", body)))
        return

    with _refusal_as_line("tokenizer", lines):
        if isinstance(tokenizer, str):
            lines.append(warning("tokenizer", f"not compared: {tokenizer}", "write model= as for training"))
        else:
            await probe.require_tokenizer(client, model, tokenizer)
            lines.append(ok("tokenizer", f"the student's, {len(tokenizer)} tokens compared"))

    with _refusal_as_line("log-probabilities", lines):
        await probe.require_scoring(client, model, 0)  # also warms the server up
        found = "of the prompt"
        if not isinstance(tokenizer, str):
            largest = await probe.largest_k(client, model, len(tokenizer))
            found += f"; at most {largest} a token{' (all)' if largest >= len(tokenizer) else ''}"
        await probe.require_scoring(client, model, k)
        latency = await _latency(lambda: score_rows(client, model, [probe.PROBE], k))
        lines += [ok("log-probabilities", found), latency]


async def _latency(ask: Callable[[], Awaitable[Any]]) -> Line:
    """The median time of a small request, one after the other."""
    times = []
    for _ in range(LATENCY_REQUESTS):
        started = time.monotonic()
        await ask()
        times.append(time.monotonic() - started)
    median = statistics.median(times)
    found = f"{median * 1000:.0f} ms for a small request"
    if median > SLOW_S:
        return warning("latency", found, "the server is busy or far away; a larger teacher.max_concurrency may help")
    return ok("latency", found)
