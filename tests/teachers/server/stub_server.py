"""A server in this process that speaks as much of vLLM's HTTP interface as the client uses, and fails on request.

Its model is a bigram table, so every log-probability is known. It binds to the loopback interface alone.
"""

import asyncio
import json
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 40
LETTERS = [chr(ord("0") + i) for i in range(VOCABULARY)]


def bigram_table(seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[float]]:
    """Row a, column b: log p(b | a)."""
    rng = random.Random(seed)
    table = []
    for _ in range(vocabulary):
        logits = [rng.gauss(0, 2) for _ in range(vocabulary)]
        total = math.log(sum(math.exp(x) for x in logits))
        table.append([x - total for x in logits])
    return table


class LetterTokenizer:
    """One token a character, the local twin of the stub's tokenizer; unknown characters are token 0."""

    def __init__(self, letters: list[str] = LETTERS) -> None:
        self.letters = letters

    def __len__(self) -> int:
        return len(self.letters)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self.letters.index(c) if c in self.letters else 0 for c in text]

    def decode(self, ids: Any) -> str:
        return "".join(self.letters[i] for i in ids if i < len(self.letters))


@dataclass
class Reply:
    """An answer, or the way it goes wrong.

    Attributes:
        fault: None, `reset` (connection broken without an answer), `half` (body cut off), `hang` (no answer for long),
            `drip` (a byte now and then, for ever).
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    fault: str | None = None
    raw: bytes | None = None


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class StubServer:
    """Start with `with StubServer() as stub`; `stub.url` is its base URL.

    Attributes:
        answer: called with every request before the model is; a `Reply` it returns is sent instead.
        model: from the ids of a row to the log-probabilities of what follows each of them but the last, (T-1, V).
        tokenizer: with `encode` and `decode`.
        encode_chat: from messages and the chat template's arguments to token ids; None: there is no chat template.
        eos_token: what /tokenizer_info says; None: it is switched off.
        requests: all requests, in order.
        connections: TCP connections accepted.
        most_at_once: the largest number of requests that were under way together.
    """

    def __init__(
        self,
        *,
        latency_s: float = 0.0,
        max_logprobs: int = VOCABULARY,
        context: int = 256,
        seed: int = 0,
        name: str = "stub",
        port: int = 0,
    ) -> None:
        self.latency_s = latency_s
        self.max_logprobs = max_logprobs
        self.context = context
        self.name = name
        self.table = bigram_table(seed)
        self.model: Callable[[list[int]], list[list[float]]] = lambda row: [self.table[token] for token in row[:-1]]
        self.tokenizer: Any = LetterTokenizer()
        self.root = "/models/stub"
        self.answer: Callable[[Request], Reply | None] = lambda request: None
        self.write: Callable[[list[dict[str, str]], int], str] = lambda messages, i: f"re: {messages[-1]['content']}"
        self.can_tokenize = True
        self.can_score = True
        self.requests: list[Request] = []
        self.connections = 0
        self.under_way = 0
        self.most_at_once = 0
        self.port = port
        self.encode_chat: Callable[..., list[int]] | None = None
        self.eos_token: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def speak_for(self, model: Any, tokenizer: Any) -> "StubServer":
        """From here on the log-probabilities are this causal language model's."""
        import torch

        def logprobs(row: list[int]) -> list[list[float]]:
            with torch.no_grad():
                return model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1).tolist()

        self.model, self.tokenizer, self.context = logprobs, tokenizer, 512
        self.max_logprobs = model.config.vocab_size
        return self

    def asked(self, path: str) -> list[Request]:
        """The requests to a path that ends so."""
        return [request for request in self.requests if request.path.endswith(path)]

    def __enter__(self) -> "StubServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)

    def stop(self) -> None:
        """Break all connections and free the port."""
        if self._loop is not None:
            loop, self._loop = self._loop, None
            loop.call_soon_threadsafe(self._end.set)
            self._thread.join(10)

    def _serve(self, started: threading.Event) -> None:
        loop = self._loop
        assert loop is not None

        async def main() -> None:
            self._end = asyncio.Event()
            self._writers: set[asyncio.StreamWriter] = set()
            server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await self._end.wait()
            server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        loop.run_until_complete(main())
        loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while request := await self._read(reader):
                self.requests.append(request)
                self.under_way += 1
                self.most_at_once = max(self.most_at_once, self.under_way)
                try:
                    reply = self.answer(request) or self._answer(request)
                    if self.latency_s:
                        await asyncio.sleep(self.latency_s)
                    if not await self._send(writer, reply):
                        return
                finally:
                    self.under_way -= 1
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Request | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        first, *lines = head.strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        return Request(method, path, headers, json.loads(content) if content else None)

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        """Whether the connection can go on."""
        content = reply.raw if reply.raw is not None else json.dumps(reply.body).encode()
        lines = [f"HTTP/1.1 {reply.status} X", "content-type: application/json", f"content-length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        if reply.fault == "reset":
            writer.transport.abort()
            return False
        if reply.fault == "hang":
            await asyncio.sleep(60)
            return False
        if reply.fault == "drip":
            writer.write(head)
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        if reply.fault == "half":
            writer.write(head + content[: len(content) // 2])
            await writer.drain()
            return False
        writer.write(head + content)
        await writer.drain()
        return True

    # What it answers when nothing is to go wrong.

    def _answer(self, request: Request) -> Reply:
        body = request.body
        if request.path == "/v1/models":
            entry = {"id": self.name, "root": self.root, "max_model_len": self.context, "created": time.time()}
            return Reply(body={"object": "list", "data": [entry]})
        if body is not None and body.get("model") != self.name:
            return refusal(404, f"The model `{body.get('model')}` does not exist.")
        if request.path == "/v1/completions":
            return self._completions(body)
        if request.path == "/v1/chat/completions":
            return Reply(body=chat_reply([self.write(body["messages"], i) for i in range(body.get("n", 1))]))
        if request.path == "/tokenizer_info" and self.eos_token is not None:
            return Reply(body={"eos_token": self.eos_token})
        if request.path == "/tokenize" and "messages" in (body or {}):
            return refusal(400, "no chat template") if self.encode_chat is None else self._tokenized_chat(body)
        if request.path == "/tokenize" and self.can_tokenize:
            return Reply(body={"tokens": self.tokenizer.encode(body["prompt"])})
        if request.path == "/detokenize" and self.can_tokenize:
            return Reply(body={"prompt": self.tokenizer.decode(body["tokens"])})
        return refusal(404, "Not Found")

    def _tokenized_chat(self, body: dict[str, Any]) -> Reply:
        assert self.encode_chat is not None
        options = {"add_generation_prompt": body["add_generation_prompt"], **body["chat_template_kwargs"]}
        return Reply(body={"tokens": self.encode_chat(body["messages"], **options)})

    def _completions(self, body: dict[str, Any]) -> Reply:
        k = body.get("prompt_logprobs")
        if k is not None and not self.can_score:
            return refusal(400, "prompt_logprobs is not supported")
        k = len(self.tokenizer) if k == -1 else k
        if k is not None and k > self.max_logprobs:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return refusal(400, message)
        prompts = body["prompt"]
        if isinstance(prompts, str):
            prompts = [self.tokenizer.encode(prompts)]
        longest = max(len(row) for row in prompts)
        if longest >= self.context:
            return refusal(400, f"maximum context length is {self.context} tokens, you asked for {longest + 1}")
        return Reply(body={"choices": [self._choice(i, row, k) for i, row in enumerate(prompts)]})

    def _choice(self, index: int, row: list[int], k: int | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": "x", "finish_reason": "length", "prompt_token_ids": row}
        if k is not None:
            entries: list[Any] = [None]
            for token, logprobs in zip(row[1:], self.model(row), strict=True):
                likeliest = sorted(range(len(logprobs)), key=lambda t: -logprobs[t])[:k]
                shown = [token, *(t for t in likeliest if t != token)]
                entries.append({str(t): {"logprob": max(logprobs[t], -9999.0), "rank": 1} for t in shown})
            choice["prompt_logprobs"] = entries
        return choice


def refusal(status: int, message: str) -> Reply:
    return Reply(status, {"error": {"message": message, "type": "BadRequestError", "code": status}})


def chat_reply(texts: list[str], finish: str = "stop") -> dict[str, Any]:
    return {
        "choices": [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
            for i, text in enumerate(texts)
        ]
    }
