"""The client against a server that misbehaves in every way that is known of servers."""

import gzip
import logging
import threading
import time
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from selfdistill.errors import UserError
from selfdistill.teachers.server.client import (
    Client,
    MalformedReply,
    ReplyError,
    RequestRefused,
    ServerUnavailable,
    all_of,
)
from selfdistill.teachers.server.endpoints import Server, parse_base_url, retry_after_s
from selfdistill.teachers.server.reply_cache import ReplyCache, cache_key
from tests.teachers.server.stub_server import Reply, Request, StubServer, refusal

QUICK: dict[str, Any] = {"timeout_s": 10.0, "patience_s": 60.0, "backoff_s": 0.01, "backoff_limit_s": 0.05}


def echo(request: Request) -> Reply | None:
    return Reply(body={"echo": request.body}) if request.path == "/v1/echo" else None


def ask(client: Client, number: int) -> Any:
    def decode(reply: Any) -> int:
        if not isinstance(reply, dict) or reply.get("echo") != {"n": number}:
            raise ReplyError("not an echo")
        return number

    return client.request("POST", "echo", {"n": number}, decode)


def ask_all(client: Client, count: int) -> list[int]:
    async def all_numbers() -> list[int]:
        return await all_of(ask(client, n) for n in range(count))

    return client.run(all_numbers())


def failing(times: int, reply: Reply) -> Callable[[Request], Reply | None]:
    """A server whose first answers are `reply`."""
    left = [times]

    def answer(request: Request) -> Reply | None:
        if request.path == "/v1/echo" and left[0] > 0:
            left[0] -= 1
            return reply
        return echo(request)

    return answer


def test_connections_are_reused_and_never_more_than_allowed() -> None:
    with StubServer(latency_s=0.01) as stub, Client(stub.url, max_concurrency=4) as client:
        stub.answer = echo
        assert ask_all(client, 40) == list(range(40))
        assert stub.most_at_once == 4
        assert stub.connections <= 4


def test_a_url_without_a_path_gets_v1_and_a_trailing_slash_is_dropped() -> None:
    assert str(parse_base_url("http://localhost:8000")) == "http://localhost:8000/v1"
    assert str(parse_base_url("https://host/openai/v1/")) == "https://host/openai/v1"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "", "http://host:port/v1"])
def test_what_is_not_a_url_is_refused_with_the_keys_name(url: str) -> None:
    with pytest.raises(UserError, match=r"teacher.base_url=.*http://localhost:8000/v1"):
        Client(url, key_prefix="teacher.")


def test_no_url_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"base_url is empty"):
        Client([])


def test_settings_out_of_range_are_refused() -> None:
    for setting in ({"max_concurrency": 0}, {"timeout_s": 0.0}, {"patience_s": -1.0}):
        with pytest.raises(UserError, match=rf"teacher.{next(iter(setting))}="):
            Client("http://127.0.0.1:1/v1", key_prefix="teacher.", **setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_passing_failures_are_asked_again(status: int) -> None:
    with StubServer() as stub, Client(stub.url, **QUICK) as client:
        stub.answer = failing(3, refusal(status, "not now"))
        assert client.run(ask(client, 7)) == 7
        assert len(stub.asked("echo")) == 4


@pytest.mark.parametrize("fault", ["reset", "half", "hang", "drip"])
def test_broken_and_endless_replies_are_asked_again(fault: str) -> None:
    with StubServer() as stub, Client(stub.url, **{**QUICK, "timeout_s": 0.5}) as client:
        stub.answer = failing(2, Reply(body={"echo": {"n": 7}}, fault=fault))
        assert client.run(ask(client, 7)) == 7
        assert len(stub.asked("echo")) >= 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_asked_again_and_carries_the_servers_words(status: int) -> None:
    with StubServer() as stub, Client(stub.url, **QUICK) as client:
        stub.answer = failing(1, refusal(status, "the reason it gives"))
        with pytest.raises(RequestRefused, match=r"the reason it gives") as refused:
            client.run(ask(client, 1))
        assert refused.value.status == status
        assert len(stub.asked("echo")) == 1


def test_a_redirect_is_named_and_not_followed() -> None:
    with StubServer() as stub, Client(stub.url, **QUICK) as client:
        stub.answer = failing(1, Reply(307, {}, {"location": "http://127.0.0.1:9/else"}))
        with pytest.raises(RequestRefused, match=r"redirects to http://127.0.0.1:9/else"):
            client.run(ask(client, 1))


@pytest.mark.parametrize("raw", [b"", b"{", b'{"echo": ', b"\xff\xfe", b"[" * 100_000, b'{"echo": NaN}', b"null"])
def test_a_reply_that_stays_unusable_ends_with_what_is_wrong(raw: bytes) -> None:
    with StubServer() as stub, Client(stub.url, **QUICK, malformed_limit=3) as client:
        stub.answer = failing(10, Reply(raw=raw))
        with pytest.raises(MalformedReply, match=r"sent 3 replies to echo that cannot be used"):
            client.run(ask(client, 1))
        assert len(stub.asked("echo")) == 3


def test_of_a_reply_without_end_no_more_is_read_than_was_asked_for() -> None:
    """Packed it is small: 100 MB of brackets are 100 kB."""
    bomb = Reply(raw=gzip.compress(b"[" * 100_000_000, 1), headers={"content-encoding": "gzip"})
    with StubServer() as stub, Client(stub.url, **QUICK, malformed_limit=2) as client:
        stub.answer = failing(1, bomb)
        assert client.run(ask(client, 1)) == 1
        stub.answer = failing(10, bomb)
        tracemalloc.start()
        with pytest.raises(MalformedReply, match="it is longer than 1 MiB"):
            client.run(client.request("POST", "echo", {}, reply_bytes=1 << 20))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 30e6


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for(as_date: bool) -> None:
    with StubServer() as stub, Client(stub.url, **QUICK) as client:
        when = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if as_date else "0.4"
        stub.answer = failing(1, Reply(429, {}, {"retry-after": when}))
        started = time.monotonic()
        client.run(ask(client, 1))
        assert time.monotonic() - started >= 0.4


def test_retry_after_beyond_the_patience_ends_at_once() -> None:
    with StubServer() as stub, Client(stub.url, **{**QUICK, "patience_s": 30.0}) as client:
        stub.answer = failing(1, Reply(503, {}, {"retry-after": "3600"}))
        with pytest.raises(ServerUnavailable, match=r"asks to wait 3600 s.*patience_s allows 30"):
            client.run(ask(client, 1))


@pytest.mark.parametrize(
    ("header", "seconds"), [("", 0), ("5", 5), ("0.5", 0.5), ("-3", 0), ("soon", 0), ("nan", 0), ("inf", 0)]
)
def test_retry_after_headers(header: str, seconds: float) -> None:
    assert retry_after_s(header) == seconds


def test_an_absent_server_says_what_was_tried_and_how_to_start_one() -> None:
    absent = Client("http://127.0.0.1:9/v1", timeout_s=1.0, patience_s=0.3, key_prefix="teacher.")
    with absent as client, pytest.raises(ServerUnavailable) as error:
        client.run(ask(client, 1))
    message = str(error.value)
    assert "http://127.0.0.1:9/v1" in message
    assert "cannot connect" in message
    assert "vllm serve" in message
    assert "teacher.patience_s" in message
    assert "teacher.base_url" in message


def test_when_patience_ends_queued_requests_end_with_it() -> None:
    """Twenty requests one at a time wait together, not one after the other."""
    with Client("http://127.0.0.1:9/v1", patience_s=0.5, max_concurrency=1) as client:
        futures = [client.submit(ask(client, n)) for n in range(20)]
        started = time.monotonic()
        for future in futures:
            with pytest.raises(ServerUnavailable):
                future.result(timeout=20)
        assert time.monotonic() - started < 9  # one after the other they would take ten seconds


def test_several_servers_are_used_evenly() -> None:
    with StubServer(latency_s=0.005) as a, StubServer(latency_s=0.005) as b, StubServer(latency_s=0.005) as c:
        a.answer = b.answer = c.answer = echo
        with Client([a.url, b.url, c.url], max_concurrency=6, **QUICK) as client:
            ask_all(client, 90)
            for n in range(30):  # also when there is never more than one request
                client.run(ask(client, n))
        counts = [len(stub.asked("echo")) for stub in (a, b, c)]
        assert min(counts) >= 30, counts


def test_a_dead_server_is_left_out_and_used_again_when_it_is_back() -> None:
    with StubServer() as a, StubServer() as b:
        a.answer = b.answer = echo
        with Client([a.url, b.url], max_concurrency=4, **QUICK) as client:
            b.stop()
            assert ask_all(client, 40) == list(range(40))
            assert client.servers[1].sent <= 4
            assert not client.servers[1].up
            back = StubServer(port=b.port)
            back.answer = echo
            with back:
                deadline = time.monotonic() + 20
                while not client.servers[1].up and time.monotonic() < deadline:
                    time.sleep(0.02)
                ask_all(client, 40)
                assert len(back.asked("echo")) >= 10


def test_a_server_that_only_fails_does_not_slow_the_other() -> None:
    with StubServer() as good, StubServer() as bad:
        good.answer = echo
        bad.answer = lambda request: refusal(500, "engine dead") if request.path == "/v1/echo" else None
        with Client([good.url, bad.url], max_concurrency=4, **{**QUICK, "backoff_limit_s": 60.0}) as client:
            assert ask_all(client, 100) == list(range(100))
        assert len(bad.asked("echo")) <= 30


def test_a_server_killed_in_the_middle_and_brought_back_loses_nothing() -> None:
    first = StubServer(latency_s=0.02)
    first.answer = echo
    first.start()
    with Client(first.url, max_concurrency=4, **QUICK) as client:
        futures = [client.submit(ask(client, n)) for n in range(60)]
        time.sleep(0.1)
        first.stop()
        time.sleep(0.3)
        second = StubServer(port=first.port)
        second.answer = echo
        with second:
            assert [future.result(timeout=30) for future in futures] == list(range(60))
        assert second.asked("echo")


def test_the_key_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("MY_KEY", f" {secret}\n")
    caplog.set_level(logging.DEBUG)

    def answer(request: Request) -> Reply | None:
        if request.path != "/v1/echo":
            return None
        assert request.headers["authorization"] == f"Bearer {secret}"
        if len(stub.asked("echo")) < 3:
            return refusal(500, f"failed for {request.headers['authorization']}")
        return refusal(401, f"Incorrect API key: {secret}")

    with StubServer() as stub, Client(stub.url, **QUICK, api_key_env="MY_KEY") as client:
        stub.answer = answer
        with pytest.raises(RequestRefused, match=r"MY_KEY.*holds a key that it does not accept") as error:
            client.run(ask(client, 1))
        told = caplog.text + str(error.value) + error.value.detail + repr(client) + str(vars(client.servers[0]))
        assert "500" in caplog.text
    assert secret not in told
    assert secret[:12] not in told


def test_without_a_key_none_is_sent_and_a_401_says_which_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with StubServer() as stub, Client(stub.url, **QUICK) as client:
        stub.answer = failing(1, refusal(401, "who are you"))
        with pytest.raises(RequestRefused, match=r"OPENAI_API_KEY .* is not set"):
            client.run(ask(client, 1))
        assert "authorization" not in stub.requests[0].headers


def test_a_broken_key_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a b")
    with pytest.raises(UserError, match=r"OPENAI_API_KEY") as error:
        Client("http://127.0.0.1:9/v1")
    assert "sk-a" not in str(error.value)


def test_a_password_in_the_url_is_not_shown() -> None:
    with Client("http://user:hush@127.0.0.1:9/v1", patience_s=0.0, timeout_s=1.0) as client:
        with pytest.raises(ServerUnavailable) as error:
            client.run(ask(client, 1))
        assert "hush" not in str(error.value) + repr(client)


def test_the_environments_proxy_is_used_but_never_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with StubServer() as proxy, StubServer() as stub:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        proxy.answer = lambda request: Reply(body={"echo": request.body})
        stub.answer = echo
        with Client("http://far.invalid/v1", **QUICK) as far, Client(stub.url, **QUICK) as near:
            assert far.run(ask(far, 1)) == 1
            assert [request.path for request in proxy.requests] == ["http://far.invalid/v1/echo"]
            assert near.run(ask(near, 2)) == 2
            assert len(stub.requests) == len(proxy.requests) == 1
        monkeypatch.setenv("no_proxy", "far.invalid")
        assert Server(parse_base_url("http://far.invalid")).proxy is None


def test_a_password_in_the_url_is_sent_instead_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    with StubServer() as stub, Client(stub.url.replace("//", "//user:hush@"), **QUICK) as client:
        stub.answer = echo
        assert client.run(ask(client, 1)) == 1
        assert stub.requests[0].headers["authorization"].startswith("Basic ")


def test_closing_ends_the_thread_and_the_connections() -> None:
    with StubServer() as stub:
        stub.answer = echo
        before = set(threading.enumerate())
        with Client(stub.url) as client:
            client.run(ask(client, 1))
            threads = set(threading.enumerate()) - before
            assert threads
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)


def test_work_goes_on_while_the_caller_does_something_else() -> None:
    with StubServer(latency_s=0.05) as stub, Client(stub.url) as client:
        stub.answer = echo
        futures = [client.submit(ask(client, n)) for n in range(4)]
        deadline = time.monotonic() + 20
        while not all(future.done() for future in futures) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(future.done() for future in futures)


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_requests_broken_off_use_up_no_connections(fault: str) -> None:
    """A pool that loses a connection with every cancelled request would stand still after a few."""
    with StubServer() as stub, Client(stub.url, max_concurrency=2, **QUICK) as client:
        stub.answer = failing(30, Reply(body={}, fault=fault))
        for n in range(30):
            future = client.submit(ask(client, n))
            deadline = time.monotonic() + 20
            while len(stub.asked("echo")) <= n and time.monotonic() < deadline:
                time.sleep(0.005)
            future.cancel()
        assert ask_all(client, 10) == list(range(10))
    assert stub.under_way == 0


def test_a_closed_client_starts_anew() -> None:
    with StubServer() as stub:
        stub.answer = echo
        client = Client(stub.url)
        assert client.run(ask(client, 1)) == 1
        client.close()
        assert client.run(ask(client, 2)) == 2
        client.close()


def test_closing_ends_what_is_under_way() -> None:
    with StubServer() as stub:
        stub.answer = failing(10, Reply(body={}, fault="hang"))
        client = Client(stub.url)
        future = client.submit(ask(client, 1))
        time.sleep(0.1)
        client.close()
        assert future.cancelled() or future.done()


def test_the_first_error_of_many_is_raised_as_it_is() -> None:
    with StubServer() as stub, Client(stub.url, **QUICK) as client:
        stub.answer = lambda request: refusal(400, "no") if request.body == {"n": 3} else echo(request)
        with pytest.raises(RequestRefused):
            ask_all(client, 10)


def test_the_cache_keeps_values_between_processes_and_survives_damage(tmp_path: Any) -> None:
    first, second = ReplyCache(tmp_path), ReplyCache(tmp_path)
    key = cache_key("m", "completions", {"a": 1})
    assert first.get(key) is None
    first.put(key, b"value")
    assert second.get(key) == b"value"
    first._database.execute("UPDATE replies SET value = x'00'")
    assert second.get(key) is None
    first.close()
    second.close()
    (tmp_path / "replies.sqlite").write_bytes(b"not a database" * 100)
    for rest in tmp_path.glob("replies.sqlite-*"):
        rest.unlink()
    with pytest.raises(UserError, match=r"replies.sqlite.*Delete that file"):
        ReplyCache(tmp_path)


def test_the_cache_key_depends_on_everything_but_the_order_of_keys() -> None:
    keys = {
        cache_key("m", "completions", {"a": 1, "b": 2}),
        cache_key("m", "completions", {"b": 2, "a": 1}),
        cache_key("n", "completions", {"a": 1, "b": 2}),
        cache_key("m", "chat/completions", {"a": 1, "b": 2}),
        cache_key("m", "completions", {"a": 1, "b": 3}),
        cache_key("m", "completions", {"a": 1, "b": 2}, 1),
    }
    assert len(keys) == 5


def test_weights_that_changed_under_the_same_name_get_another_number(tmp_path: Any) -> None:
    cache = ReplyCache(tmp_path)
    assert cache.generation("m", [-1.0, -2.0]) == 0
    assert cache.generation("m", [-1.0, -2.5]) == 1
    assert cache.generation("m", [-1.001, -2.001]) == 0
    assert cache.generation("other", [-1.0, -2.5]) == 0
