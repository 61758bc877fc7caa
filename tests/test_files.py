"""Files and folders that are there as a whole or not at all."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from selfdistill.files import DAY_S, draft_of, remove_drafts, replace_folder, write_atomically


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr("selfdistill.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("model", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "model", tmp_path / "draft")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/draft"]


def test_drafts_of_processes_that_are_gone_are_removed(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    host = socket.gethostname()
    ours, gone = draft_of(tmp_path / "a"), tmp_path / f".b.partial-{host}-{process.pid}"
    elsewhere, long_ago = tmp_path / ".c.partial-other-host-1", tmp_path / ".d.partial-other-host-1"
    for path in (ours, elsewhere, long_ago, tmp_path / ".hidden", tmp_path / "plain"):
        path.touch()
    gone.mkdir()
    (gone / "weights").touch()
    os.utime(long_ago, (0, long_ago.stat().st_mtime - 2 * DAY_S))
    remove_drafts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {ours.name, elsewhere.name, ".hidden", "plain"}
    remove_drafts(tmp_path, all_abandoned=True)
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", "plain"}
    remove_drafts(tmp_path / "missing")
