"""The HTTP client for OpenAI-compatible servers: it reuses few connections and repeats requests that fail.

One `Client` speaks to one model behind one or several base URLs. It runs its own event loop in a thread, so that a
training loop can `submit` work early and collect it later. Nothing is sent before the first request.
"""

import asyncio
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, TypeVar

import aiohttp
import orjson
from anyio import CancelScope, CapacityLimiter, create_task_group, sleep_forever, to_thread
from anyio.abc import TaskStatus
from anyio.from_thread import BlockingPortal, start_blocking_portal

from selfdistill.errors import UserError
from selfdistill.limits import check_limits, number
from selfdistill.teachers.server.endpoints import RETRIED_STATUS, Server, parse_base_url, retry_after_s

T = TypeVar("T")
log = logging.getLogger(__name__)

POLL_S = 0.02
WARN_EVERY_S = 30.0
# Servers close idle connections, the most common one (uvicorn) after 5 s; one that has been closed must not be reused.
KEEPALIVE_S = 4.0
PING_TIMEOUT_S = 5.0
START_PATIENCE_S = 5.0
# Of a reply, unpacked: far above every honest one but those of log-probabilities, whose askers say how long it may be.
REPLY_BYTES = 1 << 26
READ_BYTES = 1 << 18


class ServerUnavailable(UserError):
    """No server answered for as long as was allowed. Training state is intact: checkpoint, and continue later."""


class RequestRefused(UserError):
    """The server understood the request and declined it: to repeat it would not help.

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


class _Failed(Exception):
    """An attempt that is worth repeating."""

    def __init__(self, reason: str, *, unreachable: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.unreachable = unreachable
        self.wait_s = wait_s


class ReplyError(_Failed):
    """Raised by a `decode` function: the reply is not what was asked for, and why."""


@dataclass(eq=False, repr=False)
class Client(AbstractContextManager["Client"]):
    """Requests to one model served under one or several base URLs.

    Attributes:
        base_url: one URL or several; several are used evenly, and one that does not answer is left out until it does.
        api_key_env: the environment variable that holds the API key; unset means none is sent. The key is never logged.
        max_concurrency: requests under way at once, over all servers.
        timeout_s: time for one attempt, from sending to the last byte.
        patience_s: how long a request is tried again before `ServerUnavailable`.
        backoff_s, backoff_limit_s: first and longest pause between attempts; pauses double, and are cut at random
            by up to a half.
        malformed_limit: unusable replies to one request before `MalformedReply`.
        key_prefix: what stands before a setting's name in messages, such as `teacher.`.
        servers: one for each base URL.
        retries: attempts that were repetitions.
    """

    base_url: str | Sequence[str]
    _: KW_ONLY
    api_key_env: str = "OPENAI_API_KEY"
    max_concurrency: int = field(default=8, metadata=number(1))
    timeout_s: float = field(default=120.0, metadata=number(above=0))
    patience_s: float = field(default=300.0, metadata=number(0))
    backoff_s: float = 0.25
    backoff_limit_s: float = 20.0
    malformed_limit: int = field(default=5, metadata=number(1))
    key_prefix: str = ""

    def __post_init__(self) -> None:
        key = f"{self.key_prefix}base_url"
        urls = [self.base_url] if isinstance(self.base_url, str) else list(self.base_url)
        if not urls:
            raise UserError(f"{key} is empty. Write for example {key}=http://localhost:8000/v1")
        check_limits(Client, vars(self), lambda name: f"{self.key_prefix}{name}={vars(self)[name]}")
        self.servers = [Server(url) for url in dict.fromkeys(parse_base_url(url, key) for url in urls)]
        self.retries = 0
        self._key = os.environ.get(self.api_key_env, "").strip()
        if not self._key.isascii() or any(c.isspace() for c in self._key):
            raise UserError(
                f"The API key in the environment variable {self.api_key_env} has characters that no key has; "
                "set it again."
            )
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._warned_s = float("-inf")

    @property
    def start_patience_s(self) -> float:
        """How long a server is waited for before anything has begun: it is there, or was not started."""
        return min(START_PATIENCE_S, self.patience_s)

    @property
    def name(self) -> str:
        """The servers' addresses, for messages."""
        return ", ".join(server.name for server in self.servers)

    def __repr__(self) -> str:
        return f"Client({self.name})"

    # For threads that run no event loop.

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start a coroutine on the client's own event loop; the future's `result()` waits for it."""
        with self._lock:
            if self._portal is None:
                self._thread = ExitStack()
                self._portal = self._thread.enter_context(start_blocking_portal())
                self._portal.start_task(self._hold_session)
            return self._portal.start_task_soon(lambda: work)

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
            portal, self._portal = self._portal, None
            if portal is not None:
                portal.call(portal.stop, True)
                self._thread.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def each_alone(self, **changes: Any) -> "list[Client]":
        """A client for every single server, for checks that each has to pass."""
        return [replace(self, base_url=str(server.url), **changes) for server in self.servers]

    # What runs on the event loop.

    async def _hold_session(self, *, task_status: TaskStatus[None]) -> None:
        """Open what belongs to the event loop, and close it when the loop is told to end."""
        self._slots = asyncio.Semaphore(self.max_concurrency)
        self._unread = asyncio.Semaphore(self.max_concurrency)  # replies that wait to be read are large
        self._reader = CapacityLimiter(1)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector, headers={"Content-Type": "application/json"})
        try:
            async with create_task_group() as self._watchers:
                task_status.started()
                await sleep_forever()
        finally:
            with CancelScope(shield=True):
                await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        decode: Callable[[Any], T] = lambda reply: reply,
        reply_bytes: int = REPLY_BYTES,
    ) -> T:
        """One request, repeated until an answer comes that `decode` accepts. Runs on the client's own loop.

        Args:
            path: below the base URL, such as `completions`; with a leading slash, below the server's root.
            decode: turns the parsed JSON into the value returned; raises `ReplyError` for a reply that cannot be used.
            reply_bytes: the longest reply that is read, once it is unpacked; a longer one cannot be used.

        Raises:
            ServerUnavailable: nothing usable for `patience_s`.
            RequestRefused: the server declined (a 4xx other than 408 and 429).
            MalformedReply: `malformed_limit` unusable replies.
        """
        content = None if body is None else json.dumps(body).encode()
        for attempt in range(1, self.malformed_limit + 1):
            server, started_s, raw = await self._fetch(method, path, content, reply_bytes)
            try:
                if len(raw) > reply_bytes:
                    raise ReplyError(f"it is longer than {reply_bytes / 1024**2:.0f} MiB")
                # In another thread, and after the slot was given back: the server works on while this one reads.
                value = await to_thread.run_sync(_read, raw, decode, limiter=self._reader)
                server.failures = 0
                return value
            except ReplyError as error:
                failure = error
            finally:
                self._unread.release()
            self._note_failure(server, started_s, failure)
            self._note_retry(server, failure)
            await asyncio.sleep(self._pause_s(attempt))
        raise MalformedReply(
            f"{server.name} sent {self.malformed_limit} replies to {path} that cannot be used; the last one: "
            f"{failure}. Look into the server's log, and whether it is a vLLM of a recent version."
        )

    async def _fetch(
        self, method: str, path: str, content: bytes | None, reply_bytes: int
    ) -> tuple[Server, float, bytes]:
        """The server that answered, when it was sent the request, and the bytes. Takes a place of `_unread`."""
        waiting_since_s = time.monotonic()
        reasons: list[str] = []  # why attempts failed
        failing_since_s = float("inf")
        async with self._slots:
            while True:
                server = await self._pick(waiting_since_s, failing_since_s, reasons)
                started_s = server.last_used_s = time.monotonic()
                server.in_flight += 1
                server.sent += 1
                try:
                    raw = await self._exchange(server, method, path, content, reply_bytes)
                    break
                except _Failed as failure:
                    self._note_failure(server, started_s, failure)
                    now_s = time.monotonic()
                    failing_since_s = min(failing_since_s, now_s)
                    reasons.append(str(failure))
                    pause_s = self._pause_s(len(reasons))
                    # The pause that the servers themselves have asked for, by Retry-After.
                    server_pause_s = min((max(0.0, s.not_before_s - now_s) for s in self.servers if s.up), default=0.0)
                    if now_s + max(pause_s, server_pause_s) - failing_since_s > self.patience_s:
                        raise self._unavailable(reasons, now_s - failing_since_s, server_pause_s) from None
                    self._note_retry(server, failure)
                finally:
                    server.in_flight -= 1
                await asyncio.sleep(pause_s)
            await self._unread.acquire()
        return server, started_s, raw

    async def _pick(self, waiting_since_s: float, failing_since_s: float, reasons: list[str]) -> Server:
        """The least busy server that may be asked, once there is one."""
        while True:
            now_s = time.monotonic()
            ready = [s for s in self.servers if s.up and s.not_before_s <= now_s]
            if ready:
                return min(ready, key=lambda s: (s.in_flight, s.last_used_s))
            # A request that queued while every server was down has waited since then, not since its turn came.
            down_since_s = max(waiting_since_s, max(s.last_failure_s for s in self.servers))
            waited_s = now_s - min(failing_since_s, down_since_s)
            if waited_s > self.patience_s:
                raise self._unavailable(reasons, waited_s)
            await asyncio.sleep(POLL_S)

    async def _exchange(self, server: Server, method: str, path: str, content: bytes | None, reply_bytes: int) -> bytes:
        """One HTTP exchange: the body of a 200; of one that is too long, a little more than is allowed."""
        try:
            response, raw = await self._send(server, method, path, content, self.timeout_s, reply_bytes)
        except TimeoutError:
            raise _Failed(f"no answer within {self.timeout_s:g} s", unreachable=True) from None
        except aiohttp.ClientConnectorError as error:
            raise _Failed(self._redact(f"cannot connect ({error.os_error})"), unreachable=True) from None
        except aiohttp.ClientError as error:
            reason = f"the connection broke ({error or type(error).__name__})"
            raise _Failed(self._redact(reason), unreachable=True) from None
        if response.status in RETRIED_STATUS:
            wait_s = retry_after_s(response.headers.get("retry-after", ""))
            raise _Failed(f"HTTP {response.status} {self._detail(raw)}".strip(), wait_s=wait_s)
        if response.status != 200:
            raise self._refused(server, path, response, self._detail(raw))
        return raw

    async def _send(
        self,
        server: Server,
        method: str,
        path: str,
        content: bytes | None,
        timeout_s: float,
        reply_bytes: int = REPLY_BYTES,
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """One attempt: the response and its body, of which no more is read than a little over what is allowed.

        Raises:
            TimeoutError: no complete answer in time.
            aiohttp.ClientError: the connection failed.
        """
        # A user name in the address is sent as such, and leaves no place for a key.
        headers = {"Authorization": f"Bearer {self._key}"} if self._key and server.url.user is None else None
        url, limit = server.address(path), aiohttp.ClientTimeout(total=timeout_s)
        async with self._session.request(
            method, url, data=content, headers=headers, proxy=server.proxy, allow_redirects=False, timeout=limit
        ) as response:
            body = bytearray()
            async for block in response.content.iter_chunked(READ_BYTES):
                body += block
                if len(body) > reply_bytes:
                    response.close()
                    break
            return response, bytes(body)

    def _note_failure(self, server: Server, started_s: float, failure: _Failed) -> None:
        """Give a failing server a pause, and watch one that cannot be reached until it can."""
        now_s = time.monotonic()
        if started_s >= server.last_failure_s:  # requests that failed together count once
            server.failures += 1
        server.last_failure_s = now_s
        if failure.wait_s:
            server.not_before_s = max(server.not_before_s, now_s + failure.wait_s)
        elif len(self.servers) > 1:  # alone, the request's own pause is enough
            server.not_before_s = max(server.not_before_s, now_s + self._pause_s(server.failures))
        if failure.unreachable and server.up:
            server.up = False
            self._watchers.start_soon(self._watch, server)

    async def _watch(self, server: Server) -> None:
        """Ask a server for its models until it answers."""
        attempts = 0
        while not server.up:
            try:
                response, _ = await self._send(server, "GET", "models", None, min(PING_TIMEOUT_S, self.timeout_s))
                server.up = response.status < 500
            except (TimeoutError, aiohttp.ClientError):
                pass
            if not server.up:
                attempts += 1
                await asyncio.sleep(min(self._pause_s(attempts), PING_TIMEOUT_S))

    def _pause_s(self, failures: int) -> float:
        """Exponential back-off with jitter, in seconds."""
        return min(self.backoff_limit_s, self.backoff_s * 2 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)

    # The words for what goes wrong.

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _detail(self, raw: bytes) -> str:
        """The server's own words, shortened, without the key should it echo it."""
        try:
            reply = orjson.loads(raw)
            error = reply.get("error", reply)
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            text = raw.decode(errors="replace")
        text = " ".join(self._redact(text).split())
        return text if len(text) <= 500 else text[:500] + "…"

    def _refused(self, server: Server, path: str, response: aiohttp.ClientResponse, detail: str) -> RequestRefused:
        status = response.status
        message = f"{server.name} refused a request to {path} with HTTP {status}: {detail}"
        if status in (401, 403):
            state = "holds a key that it does not accept" if self._key else "is not set"
            message += f"\nThe environment variable {self.api_key_env} ({self.key_prefix}api_key_env) {state}."
        elif 300 <= status < 400:
            target = response.headers.get("location", "elsewhere")
            message += f"\nIt redirects to {target}: write the final address in {self.key_prefix}base_url."
        return RequestRefused(message, status, detail)

    def _unavailable(self, reasons: list[str], waited_s: float, server_pause_s: float = 0.0) -> ServerUnavailable:
        last = reasons[-1] if reasons else "it could not be reached by earlier requests either"
        wish = ""
        if server_pause_s:
            wish = f" It asks to wait {server_pause_s:.0f} s, {self.key_prefix}patience_s allows {self.patience_s:g}."
        longer = f" Waiting longer: {self.key_prefix}patience_s=SECONDS." if self.patience_s != START_PATIENCE_S else ""
        return ServerUnavailable(
            f"No usable answer from {self.name} for {waited_s:.0f} s ({len(reasons)} attempts; the last one: {last})."
            f"{wish}\nIs the server running? To start one: vllm serve MODEL --served-model-name NAME --port PORT\n"
            f"Another address: {self.key_prefix}base_url=http://HOST:PORT/v1.{longer}"
        )

    def _note_retry(self, server: Server, failure: _Failed) -> None:
        """Count the attempt to come, and warn of it now and then."""
        self.retries += 1
        now_s = time.monotonic()
        if now_s - self._warned_s >= WARN_EVERY_S:
            self._warned_s = now_s
            log.warning("%s: %s; trying again for up to %g s", server.name, failure, self.patience_s)


def _read(raw: bytes, decode: Callable[[Any], T]) -> T:
    """What `decode` makes of a body."""
    try:
        reply = orjson.loads(raw)  # replies with log-probabilities are large
    except ValueError as error:
        raise ReplyError(f"its body is not JSON ({error})") from None
    return decode(reply)


def part(reply: Any, name: str, kind: type[T]) -> T:
    """One value of a JSON object.

    Raises:
        ReplyError: the reply is no object, has no such value, or one of another type.
    """
    value = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(value, kind):
        raise ReplyError(f"{name} is missing, or is not of the type {kind.__name__}")
    return value


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of several coroutines that run together; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
