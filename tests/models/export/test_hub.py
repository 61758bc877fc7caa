"""Uploads to a stub of the hub's API, in this process and on the loopback interface alone."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from selfdistill.errors import UserError
from selfdistill.models.export import ExportError, Exports
from selfdistill.models.export.hub import push

# Of the hub's client, which passes files on to httpx in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_notarealtoken"


class StubHub(ThreadingHTTPServer):
    """What it was sent: repositories with their visibility, files of commits, large files by their hash.

    Attributes:
        refuses: how many uploads of large files still fail.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, bool] = {}
        self.committed: dict[str, set[str]] = {}
        self.large: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: StubHub

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        there = [{"type": "file", "path": "old.gguf", "size": 1, "oid": "0"}]
        info = {"id": "me/mine", "sha": "0", "siblings": [{"rfilename": "old.gguf"}]}
        self._answer(there if "/tree/" in self.path else info)

    def do_PUT(self) -> None:
        content = self._body()
        if self.server.refuses:
            self.server.refuses -= 1
            return self._answer({"error": "no room"}, 403)
        self.server.large[self.path.rsplit("/", 1)[1]] = content
        self.server.uploads.append(self.path.rsplit("/", 1)[1])
        return self._answer({})

    def do_POST(self) -> None:
        hub, raw = self.server, self._body()
        hub.tokens.add(self.headers.get("Authorization"))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "log in"}, 401)
        if self.path.endswith("/commit/main"):
            repository = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            lines = [json.loads(line) for line in raw.splitlines()]
            for line in lines:
                if line["key"] in ("file", "lfsFile", "deletedFile"):
                    hub.committed.setdefault(repository, set()).add(f"{line['key']} {line['value']['path']}")
            return self._answer({"commitUrl": f"{hub.url}/{repository}/commit/1", "commitOid": "1", "success": True})
        body = json.loads(raw or b"{}")
        if self.path == "/api/repos/create":
            name = f"{body['organization']}/{body['name']}"
            hub.repositories[name] = body.get("private", body.get("visibility") == "private")
            return self._answer({"url": f"{hub.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            kinds = {True: "lfs", False: "regular"}
            files = [
                {"path": file["path"], "uploadMode": kinds[file["path"].endswith("gguf")], "shouldIgnore": False}
                for file in body["files"]
            ]
            return self._answer({"files": files})
        objects = []
        for wanted in body["objects"]:  # of Git LFS' batch API: what is there already needs no action
            there = wanted["oid"] in hub.large
            upload = {"upload": {"href": f"{hub.url}/store/{wanted['oid']}"}}
            objects.append(wanted | ({} if there else {"actions": upload}))
        return self._answer({"transfer": "basic", "objects": objects})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    # The client keeps an answer of the hub for other programs of this user.
    monkeypatch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
    with StubHub() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.utils.disable_progress_bars()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"weights" * 1000)
    (folder / "README.md").write_text("---\nlibrary_name: gguf\n---\n# mine\n")
    (folder / "verification.json").write_text('{"verdict": "equal"}')
    return folder


@pytest.mark.parametrize("private", [True, False])
def test_an_export_is_uploaded(hub: StubHub, folder: Path, private: bool) -> None:
    assert push(folder, "me/mine", private=private) == f"{hub.url}/me/mine"
    assert hub.repositories == {"me/mine": private}
    assert hub.committed["me/mine"] == {
        "lfsFile model.gguf",
        "file README.md",
        "file verification.json",
        "deletedFile old.gguf",
    }
    assert list(hub.large.values()) == [b"weights" * 1000]
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_broken_upload_goes_on_where_it_was(hub: StubHub, folder: Path) -> None:
    (folder / "more.gguf").write_bytes(b"more")
    hub.refuses = 1
    with pytest.raises(ExportError, match=r"the upload to me/mine failed: .*The export itself is whole"):
        push(folder, "me/mine")
    assert "me/mine" not in hub.committed
    arrived = list(hub.uploads)
    push(folder, "me/mine")
    assert len(hub.uploads) == len(set(hub.uploads))
    assert set(arrived) <= set(hub.uploads)
    assert hashlib.sha256(b"more").hexdigest() in hub.large


@pytest.mark.parametrize("verdict", ['{"verdict": "differs"}', '{"verdict": "not verified"}', "{", None])
def test_what_is_not_verified_stays_here(hub: StubHub, folder: Path, verdict: str | None) -> None:
    if verdict is None:
        (folder / "verification.json").unlink()
    else:
        (folder / "verification.json").write_text(verdict)
    with pytest.raises(ExportError, match="is not uploaded: its verification is"):
        push(folder, "me/mine")
    assert not hub.repositories


def test_a_missing_token_is_said(hub: StubHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ExportError, match="hf auth login") as refused:
        push(folder, "me/mine")
    assert "hf_another" not in str(refused.value)


@pytest.mark.parametrize("name", ["mine", "a/b/c", "/x", "x/"])
def test_a_repository_has_an_owner(name: str) -> None:
    with pytest.raises(UserError, match=rf"export\.push_to={name}: write OWNER/NAME"):
        Exports({}, push_to=name)
