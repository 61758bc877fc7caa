"""A server that knows as much of W&B's API as a run and a workspace need, and that can answer byte by byte."""

import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VIEWER = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
PROJECT = {
    "__typename": "Project", "id": "p", "internalId": "p1", "name": "selfdistill", "entityName": "me",
    "entity": {"id": "e", "name": "me"}, "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None,
}  # fmt: skip
# The first of these words that a query holds decides the answer.
ANSWERS: dict[str, dict[str, Any]] = {
    "upsertBucket": {"upsertBucket": {"bucket": {"id": "b", "name": "r", "config": "{}", "project": PROJECT,
                                                 "historyLineCount": 0}, "inserted": True}},
    "upsertView": {"upsertView": {"view": {"id": "v", "name": "nw-abc-v", "displayName": "g", "type": "runs",
                                           "description": "", "project": PROJECT, "spec": "{}",
                                           "updatedAt": "2026-01-01T00:00:00Z"}, "inserted": True}},
    "RunResumeStatus": {"model": None},
    "viewer": {"viewer": VIEWER, "serverInfo": {"features": [], "cliVersionInfo": {}}},
    "GetProjects": {"models": {"edges": [{"node": PROJECT, "cursor": ""}],
                            "pageInfo": {"endCursor": "", "hasNextPage": False}}},
    "project": {"project": PROJECT},
}  # fmt: skip


class WandbServer:
    """A context manager.

    Args:
        drips_from: a word; the first query that holds it, and what follows, is answered a byte each half second.

    Attributes:
        queries: what was asked, each with its variables.
    """

    def __init__(self, drips_from: str = "never") -> None:
        self.queries: list[tuple[str, dict[str, Any]]] = []
        self._drips_from, self._dripping, self._began = drips_from, threading.Event(), time.monotonic()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                answer = outer._answer(body) if self.path.endswith("/graphql") else b"{}"
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                for start in range(len(answer)) if outer._dripping.is_set() else ():
                    time.sleep(0.5)
                    try:
                        self.wfile.write(answer[start : start + 1])
                    except OSError:
                        return
                if not outer._dripping.is_set():
                    self.wfile.write(answer)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False

    def __enter__(self) -> "WandbServer":  # noqa: PYI034 - beartype, which checks types in the tests, refuses Self here
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def seconds_open(self) -> float:
        return time.monotonic() - self._began

    def drip(self) -> None:
        """From now on answer byte by byte."""
        self._dripping.set()

    def _answer(self, body: bytes) -> bytes:
        asked = json.loads(body)
        self.queries.append((asked["query"], asked.get("variables") or {}))
        if self._drips_from in asked["query"]:
            self.drip()
        data = next((answer for word, answer in ANSWERS.items() if word in asked["query"]), {})
        return json.dumps({"data": data}).encode()
