"""A pool of connections that stays whole when requests are broken off."""

import asyncio
import functools
import ssl
from dataclasses import dataclass

import httpx

# Servers close idle connections, the most common one (uvicorn) after 5 s; one that has been closed must not be reused.
KEEPALIVE_S = 4.0


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """Reading the certificates takes as long as many requests do."""
    return httpx.create_ssl_context()


@dataclass(eq=False)
class _Session:
    http: httpx.AsyncClient
    in_use: int = 0


class Connections:
    """Sends requests over reused connections; all calls on one event loop.

    httpx's pool keeps a connection for ever whose request was cancelled (httpcore 1.0.9), until none is left. So after a
    cancellation the pool is left to the requests that still use it and closed after the last of them.

    Args:
        most: connections kept open.
        headers: sent with every request.
        timeout_s: time for one request, from sending to the last byte.
    """

    def __init__(self, most: int, headers: dict[str, str], timeout_s: float) -> None:
        self._most = most
        self._headers = headers
        self._timeout_s = timeout_s
        self._session: _Session | None = None

    async def send(
        self, method: str, url: str, content: bytes | None = None, timeout_s: float | None = None
    ) -> httpx.Response:
        """One exchange.

        Raises:
            TimeoutError: no complete answer in time.
            httpx.HTTPError: the connection failed.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if self._session is None:
            self._session = self._open()
        session = self._session
        session.in_use += 1
        try:
            async with asyncio.timeout(limit_s):
                # httpx's own limit is for every single read: it ends a silent server, and ends it cleanly.
                return await session.http.request(method, url, content=content, timeout=0.9 * limit_s)
        except httpx.TimeoutException:
            raise TimeoutError from None
        except (TimeoutError, asyncio.CancelledError):
            if self._session is session:
                self._session = None
            raise
        finally:
            session.in_use -= 1
            if session is not self._session and session.in_use == 0:
                await session.http.aclose()

    async def close(self) -> None:
        """Close what no request uses any more."""
        session, self._session = self._session, None
        if session is not None and session.in_use == 0:
            await session.http.aclose()

    def _open(self) -> _Session:
        http = httpx.AsyncClient(
            verify=_tls_context(),
            headers=self._headers,
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=self._most, keepalive_expiry=KEEPALIVE_S
            ),
            # A proxy of the environment is for the outside, never for this machine.
            mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},
        )
        return _Session(http)
