"""The HTTP client for OpenAI-compatible servers: few connections, reused; bounded; patient with servers that falter.

One `Client` speaks to one model behind one or several base URLs. It runs its own event loop in a thread, so that a
training loop can `submit` work early and collect it later. Nothing is sent before the first request.
"""

import asyncio
import concurrent.futures
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import httpx
import orjson

from selfdistill.errors import UserError
from selfdistill.teachers.server.connections import Connections
from selfdistill.teachers.server.endpoints import RETRIED_STATUS, Server, parse_base_url, retry_after_s

T = TypeVar("T")
log = logging.getLogger(__name__)

POLL_S = 0.02
WARN_EVERY_S = 30.0


class ServerUnavailable(UserError):
    """No server answered for as long as was allowed. Training state is intact: checkpoint, and continue later."""


class RequestRefused(UserError):
    """The server understood and declined: asking again would not help.

    Attributes:
        status: the HTTP status.
        detail: the server's own words.
    """

    def __init__(self, message: str, status: int, detail: str) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail


class MalformedReply(UserError):
    """The server kept sending replies that are not what was asked for."""


class ReplyError(Exception):
    """Raised by a `decode` function: the reply is not what was asked for, and why."""


class _Failed(Exception):
    """An attempt that is worth repeating."""

    def __init__(self, reason: str, *, unreachable: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.unreachable = unreachable
        self.wait_s = wait_s


class Client:
    """Requests to one model served under one or several base URLs.

    Args:
        base_url: one URL or several; several are used evenly, and one that does not answer is left out until it does.
        api_key_env: the environment variable that holds the API key; unset means none is sent. The key is never logged.
        max_concurrency: requests under way at once, over all servers.
        timeout_s: time for one attempt, from sending to the last byte.
        patience_s: how long a request is tried again before `ServerUnavailable`.
        backoff_s, backoff_limit_s: first and longest pause between attempts; pauses double, and a random half is left off.
        malformed_limit: unusable replies to one request before `MalformedReply`.
        key_prefix: what stands before a setting's name in messages, such as `teacher.`.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 8,
        timeout_s: float = 120.0,
        patience_s: float = 300.0,
        backoff_s: float = 0.25,
        backoff_limit_s: float = 20.0,
        malformed_limit: int = 5,
        key_prefix: str = "",
    ) -> None:
        self.prefix = key_prefix
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise UserError(
                f"{key_prefix}base_url is empty. Write for example {key_prefix}base_url=http://localhost:8000/v1"
            )
        for name, value in {
            "max_concurrency": max_concurrency,
            "timeout_s": timeout_s,
            "malformed_limit": malformed_limit,
        }.items():
            if value <= 0:
                raise UserError(f"{key_prefix}{name}={value}: must be above 0.")
        if patience_s < 0:
            raise UserError(f"{key_prefix}patience_s={patience_s}: must be 0 or more seconds.")
        self.servers = [Server(url) for url in dict.fromkeys(parse_base_url(u, f"{key_prefix}base_url") for u in urls)]
        self.api_key_env = api_key_env
        self.max_concurrency = max_concurrency
        self.timeout_s = timeout_s
        self.patience_s = patience_s
        self.backoff_s = backoff_s
        self.backoff_limit_s = backoff_limit_s
        self.malformed_limit = malformed_limit
        self.retries = 0
        self._key = os.environ.get(api_key_env, "").strip()
        if not self._key.isascii() or any(c.isspace() for c in self._key):
            raise UserError(
                f"The API key in the environment variable {api_key_env} has characters that no key has; set it again."
            )
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._connections = Connections(max_concurrency + len(self.servers), headers, timeout_s)
        self._slots = asyncio.Semaphore(max_concurrency)
        self._unread = asyncio.Semaphore(max_concurrency)  # replies that wait to be read are large
        self._probes: set[asyncio.Task[None]] = set()
        self._warned_s = float("-inf")

    @property
    def name(self) -> str:
        """The servers' addresses, for messages."""
        return ", ".join(server.name for server in self.servers)

    def __repr__(self) -> str:
        return f"Client({self.name})"

    # The face for threads that run no event loop.

    def submit(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Start a coroutine on the client's own event loop; the future's `result()` waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self._running_loop())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the client's own event loop and wait for it; an interrupt here cancels it there."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Drop what is under way and end the thread. A later request starts anew."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._shut_down(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            self._reader.shutdown()
            loop.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def each_alone(self, **changes: Any) -> "list[Client]":
        """A client for every single server, for checks that each has to pass."""
        settings = {
            "api_key_env": self.api_key_env, "max_concurrency": self.max_concurrency, "timeout_s": self.timeout_s,
            "patience_s": self.patience_s, "backoff_s": self.backoff_s, "backoff_limit_s": self.backoff_limit_s,
            "malformed_limit": self.malformed_limit, "key_prefix": self.prefix,
        }  # fmt: skip
        return [Client(str(server.url), **{**settings, **changes}) for server in self.servers]

    # What runs on the event loop.

    async def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        decode: Callable[[Any], Any] = lambda reply: reply,
    ) -> Any:
        """One request, repeated until an answer comes that `decode` accepts. Runs on the client's own loop.

        Args:
            path: below the base URL, such as `completions`; with a leading slash, below the server's root.
            decode: turns the parsed JSON into the value returned; raises `ReplyError` for a reply that cannot be used.

        Raises:
            ServerUnavailable: nothing usable for `patience_s`.
            RequestRefused: the server declined (a 4xx other than 408 and 429).
            MalformedReply: `malformed_limit` unusable replies.
        """
        content = None if body is None else json.dumps(body).encode()
        reason = ""
        for attempt in range(1, self.malformed_limit + 1):
            server, started, raw = await self._fetch(method, path, content)
            try:
                # In another thread, and after the slot was given back: the server works on while this one reads.
                value = await asyncio.get_running_loop().run_in_executor(self._reader, _read, raw, decode)
            except ReplyError as error:
                reason = str(error)
            else:
                server.failures = 0
                return value
            finally:
                self._unread.release()
            failure = _Failed(reason)
            self._note_failure(server, started, failure)
            self._warn(server, failure)
            self.retries += 1
            await asyncio.sleep(self._pause_s(attempt))
        raise MalformedReply(
            f"{server.name} sent {self.malformed_limit} replies to {path} that cannot be used; the last one: {reason}. "
            "Look into the server's log, and whether it is a vLLM of a recent version."
        )

    async def _fetch(self, method: str, path: str, content: bytes | None) -> tuple[Server, float, bytes]:
        """The bytes of an answer, with the server that gave it and when it was asked. Holds a place among the unread."""
        waiting_since = time.monotonic()
        trouble: list[str] = []  # reasons of the failed attempts
        trouble_since = float("inf")
        async with self._slots:
            while True:
                server = await self._pick(waiting_since, trouble_since, trouble)
                started = server.last_used_s = time.monotonic()
                server.in_flight += 1
                server.sent += 1
                try:
                    raw = await self._exchange(server, method, path, content)
                    break
                except _Failed as failure:
                    self._note_failure(server, started, failure)
                    now = time.monotonic()
                    trouble_since = min(trouble_since, now)
                    trouble.append(str(failure))
                    pause_s = self._pause_s(len(trouble))
                    asked_s = min((max(0.0, s.not_before_s - now) for s in self.servers if s.up), default=0.0)
                    if now + max(pause_s, asked_s) - trouble_since > self.patience_s:
                        raise self._unavailable(trouble, now - trouble_since, asked_s) from None
                    self._warn(server, failure)
                finally:
                    server.in_flight -= 1
                self.retries += 1
                await asyncio.sleep(pause_s)
            await self._unread.acquire()
        return server, started, raw

    async def _pick(self, waiting_since: float, trouble_since: float, trouble: list[str]) -> Server:
        """The least busy server that may be asked, once there is one."""
        while True:
            now = time.monotonic()
            ready = [s for s in self.servers if s.up and s.not_before_s <= now]
            if ready:
                return min(ready, key=lambda s: (s.in_flight, s.last_used_s))
            # A request that queued while every server was down has waited since then, not since its turn came.
            down_since = max(waiting_since, max(s.last_failure_s for s in self.servers))
            waited_s = now - min(trouble_since, down_since)
            if waited_s > self.patience_s:
                raise self._unavailable(trouble, waited_s)
            await asyncio.sleep(POLL_S)

    async def _exchange(self, server: Server, method: str, path: str, content: bytes | None) -> bytes:
        """One HTTP exchange: the body of a 200."""
        base = str(server.url)
        url = base.removesuffix("/v1") + path if path.startswith("/") else f"{base}/{path}"
        try:
            response = await self._connections.send(method, url, content)
        except TimeoutError:
            raise _Failed(f"no answer within {self.timeout_s:g} s", unreachable=True) from None
        except httpx.TransportError as error:
            what = "cannot connect" if isinstance(error, httpx.ConnectError) else "the connection broke"
            raise _Failed(self._redact(f"{what} ({error or type(error).__name__})"), unreachable=True) from None
        except httpx.DecodingError as error:
            raise _Failed(f"its body cannot be unpacked ({error})") from None
        if response.status_code in RETRIED_STATUS:
            wait_s = retry_after_s(response.headers.get("retry-after", ""))
            raise _Failed(f"HTTP {response.status_code} {self._detail(response)}".strip(), wait_s=wait_s)
        if response.status_code != 200:
            raise self._refused(server, path, response)
        return response.content

    def _note_failure(self, server: Server, started: float, failure: _Failed) -> None:
        """Give a failing server a pause, and watch one that cannot be reached until it can."""
        now = time.monotonic()
        if started >= server.last_failure_s:  # requests that failed together count once
            server.failures += 1
        server.last_failure_s = now
        if failure.wait_s:
            server.not_before_s = max(server.not_before_s, now + failure.wait_s)
        elif len(self.servers) > 1:  # alone, the request's own pause is enough
            server.not_before_s = max(server.not_before_s, now + self._pause_s(server.failures))
        if failure.unreachable and server.up:
            server.up = False
            probe = asyncio.create_task(self._probe(server))
            self._probes.add(probe)
            probe.add_done_callback(self._probes.discard)

    async def _probe(self, server: Server) -> None:
        """Ask a server for its models until it answers."""
        tried = 0
        while True:
            try:
                response = await self._connections.send(
                    "GET", f"{server.url}/models", timeout_s=min(5.0, self.timeout_s)
                )
                if response.status_code < 500:
                    server.up = True
                    return
            except (TimeoutError, httpx.HTTPError):
                pass
            tried += 1
            await asyncio.sleep(min(self._pause_s(tried), 5.0))

    def _pause_s(self, failures: int) -> float:
        """Exponential back-off with jitter, in seconds."""
        return min(self.backoff_limit_s, self.backoff_s * 2 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._reader = concurrent.futures.ThreadPoolExecutor(1, "selfdistill-reader")
                self._thread = threading.Thread(target=self._loop.run_forever, name="selfdistill-client", daemon=True)
                self._thread.start()
            return self._loop

    async def _shut_down(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._connections.close()
        await asyncio.sleep(0.01)  # sockets close in a later turn of the loop
        self._slots = asyncio.Semaphore(self.max_concurrency)
        self._unread = asyncio.Semaphore(self.max_concurrency)

    # What is said when it goes wrong.

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _detail(self, response: httpx.Response) -> str:
        """The server's own words, shortened, without the key should it echo it."""
        try:
            reply = response.json()
            error = reply.get("error", reply)
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            text = response.text
        text = " ".join(self._redact(text).split())
        return text if len(text) <= 500 else text[:500] + "…"

    def _refused(self, server: Server, path: str, response: httpx.Response) -> RequestRefused:
        status, detail = response.status_code, self._detail(response)
        message = f"{server.name} refused a request to {path} with HTTP {status}: {detail}"
        if status in (401, 403):
            state = "holds a key that it does not accept" if self._key else "is not set"
            message += f"\nThe environment variable {self.api_key_env} ({self.prefix}api_key_env) {state}."
        elif 300 <= status < 400:
            message += f"\nIt redirects to {response.headers.get('location', 'elsewhere')}: write the final address in {self.prefix}base_url."
        return RequestRefused(message, status, detail)

    def _unavailable(self, trouble: list[str], waited_s: float, wait_s: float = 0.0) -> ServerUnavailable:
        last = trouble[-1] if trouble else "it could not be reached by earlier requests either"
        asks = f" It asks to wait {wait_s:.0f} s, {self.prefix}patience_s allows {self.patience_s:g}." if wait_s else ""
        return ServerUnavailable(
            f"No usable answer from {self.name} for {waited_s:.0f} s ({len(trouble)} attempts; the last one: {last}).{asks}\n"
            f"Is the server running? To start one: vllm serve MODEL --served-model-name NAME --port PORT\n"
            f"Another address: {self.prefix}base_url=http://HOST:PORT/v1. Waiting longer: {self.prefix}patience_s=SECONDS."
        )

    def _warn(self, server: Server, failure: _Failed) -> None:
        now = time.monotonic()
        if now - self._warned_s >= WARN_EVERY_S:
            self._warned_s = now
            log.warning("%s: %s; trying again for up to %g s", server.name, failure, self.patience_s)


def _read(raw: bytes, decode: Callable[[Any], Any]) -> Any:
    """What `decode` makes of a body."""
    try:
        reply = orjson.loads(raw)  # replies with log-probabilities are large
    except ValueError as error:
        raise ReplyError(f"its body is not JSON ({error})") from None
    return decode(reply)


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of several coroutines that run together; the first error ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    if not tasks:
        return []
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
    return [task.result() for task in tasks]
