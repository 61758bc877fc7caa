"""How much of a server's speed the client passes on.

    python experiments/benchmarks/client_speed.py
    python experiments/benchmarks/client_speed.py --url http://127.0.0.1:8000/v1 --model embedded --out speed.json

First against a stub with 100 ms latency: 64 requests at concurrency 8, ideally 0.8 s. Then, with --url, against a real
vLLM server: tokens scored per second at concurrency 1, 4 and 16 by `ServerTeacher.score`, and by a bare loop that posts
the same bodies and throws the replies away unread. The two take turns, so that a busy machine slows both.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[2]))

from selfdistill.teachers.server import ServerTeacher
from selfdistill.teachers.server.client import Client, all_of
from selfdistill.teachers.server.prompt_logprobs import scoring_body
from tests.teachers.server.stub_server import Reply, StubServer

LATENCY_S, REQUESTS, CONCURRENCY = 0.1, 64, 8
Rows = list[list[int]]


def stub_seconds(rounds: int) -> dict[str, Any]:
    """Seconds for 64 requests at concurrency 8, every round with the connections of the one before."""
    with StubServer(latency_s=LATENCY_S) as stub, Client(stub.url, max_concurrency=CONCURRENCY) as client:
        stub.answer = lambda request: Reply(body={"ok": True}) if request.path == "/v1/echo" else None

        async def all_requests() -> None:
            await all_of(client.request("POST", "echo", {"n": n}) for n in range(REQUESTS))

        seconds = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            client.run(all_requests())
            seconds.append(time.perf_counter() - started)
    ideal = LATENCY_S * REQUESTS / CONCURRENCY
    return {
        "first_s": round(seconds[0], 3),
        "median_s": round(statistics.median(seconds[1:]), 3),
        "ideal_s": ideal,
        "times_ideal": round(statistics.median(seconds[1:]) / ideal, 3),
    }


def random_rows(count: int, tokens: int, vocabulary: int) -> tuple[Rows, Rows]:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, vocabulary) for _ in range(tokens // 2)] for _ in range(count)]
    completions = [[rng.randrange(3, vocabulary) for _ in range(tokens - tokens // 2)] for _ in range(count)]
    return prompts, completions


async def bare_loop(url: str, bodies: list[bytes], concurrency: int) -> None:
    slots = asyncio.Semaphore(concurrency)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(600)) as http:

        async def post(body: bytes) -> None:
            async with slots, http.post(f"{url}/completions", data=body) as response:
                response.raise_for_status()
                await response.read()

        await asyncio.gather(*(post(body) for body in bodies))


def server_throughput(url: str, model: str, concurrency: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second through the teacher and through the bare loop, median over rounds."""
    prompts, completions = random_rows(arguments.rows, arguments.tokens, arguments.vocabulary)
    teacher = ServerTeacher(url, model, top_k=arguments.top_k, max_concurrency=concurrency)
    bodies = [
        json.dumps(scoring_body(model, [row.ids for row in batch], arguments.top_k)).encode()
        for batch in teacher.scorer.batches(teacher.scorer.rows(prompts, completions))
    ]
    tokens = arguments.rows * arguments.tokens
    ours, bare = [], []
    for turn in range(arguments.rounds + 1):
        started = time.perf_counter()
        teacher.score(prompts, completions)
        between = time.perf_counter()
        asyncio.run(bare_loop(url, bodies, concurrency))
        if turn:  # the first warms the server up
            ours.append(between - started)
            bare.append(time.perf_counter() - between)
    teacher.close()
    return {
        "concurrency": concurrency,
        "requests": len(bodies),
        "client_tokens_per_s": round(tokens / statistics.median(ours)),
        "bare_tokens_per_s": round(tokens / statistics.median(bare)),
        "ratio": round(statistics.median(b / o for b, o in zip(bare, ours, strict=True)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200, help="of prompt and completion together")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=102)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"stub": stub_seconds(arguments.rounds)}
    print(json.dumps(results["stub"]))
    if arguments.url:
        settings = {key: getattr(arguments, key) for key in ("rows", "tokens", "top_k", "rounds")}
        results["server"] = {"settings": settings, "throughput": []}
        for concurrency in (1, 4, 16):
            results["server"]["throughput"].append(
                server_throughput(arguments.url, arguments.model, concurrency, arguments)
            )
            print(json.dumps(results["server"]["throughput"][-1]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
