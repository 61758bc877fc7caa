"""The addresses of a served model, and what HTTP says about trying again."""

import time
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from urllib.request import getproxies, proxy_bypass

from yarl import URL

from selfdistill.errors import UserError

RETRIED_STATUS = frozenset({408, 429, *range(500, 600)})
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


@dataclass(eq=False)
class Server:
    """One base URL and what is known of it. Times are those of `time.monotonic`."""

    url: URL
    sent: int = 0
    in_flight: int = 0
    last_used_s: float = 0.0
    failures: int = 0
    last_failure_s: float = 0.0
    not_before_s: float = 0.0
    up: bool = True

    @property
    def name(self) -> str:
        """The URL without a user name or password in it."""
        return str(self.url.with_user(None))

    @cached_property
    def proxy(self) -> str | None:
        """The proxy that the environment names for this address; never one for this machine."""
        host = self.url.host or ""
        if host in THIS_MACHINE or proxy_bypass(host):
            return None
        proxies = getproxies()
        return proxies.get(self.url.scheme) or proxies.get("all")

    def address(self, path: str) -> str:
        """The address of a path below the base URL, or with a leading slash below the server's root."""
        base = str(self.url)
        return base.removesuffix("/v1") + path if path.startswith("/") else f"{base}/{path}"


def parse_base_url(text: str, key: str = "base_url") -> URL:
    """The URL whose path ends where `/completions` begins; `/v1` is added to a URL without a path.

    Raises:
        UserError: not an http or https URL.
    """
    try:
        url = URL(str(text).strip().rstrip("/"))
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("it needs http:// or https:// and a host")
    except ValueError as error:
        raise UserError(
            f"{key}={text}: not an http URL; {error}. Write for example {key}=http://localhost:8000/v1"
        ) from None
    return url if url.path.strip("/") else url.with_path("/v1")


def retry_after_s(header: str) -> float:
    """The seconds that a `Retry-After` header asks for, as a number or as a date; 0 where it asks for none."""
    seconds = 0.0
    try:
        seconds = float(header)
    except ValueError:
        with suppress(ValueError, OverflowError):
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
    return seconds if 0 <= seconds < float("inf") else 0.0
