"""Answers of a server on disk, so that sweeps and resumed runs don't ask twice. Safe for several processes at once."""

import hashlib
import json
import logging
import sqlite3
import threading
import zlib
from pathlib import Path
from typing import Any

from selfdistill.errors import UserError

log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS models (name TEXT, generation INTEGER, probe TEXT, PRIMARY KEY (name, generation));
"""


class ReplyCache:
    """A key-value store in `FOLDER/replies.sqlite`.

    Raises:
        UserError: the folder cannot be written, or the file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / "replies.sqlite"
        self._lock = threading.Lock()
        self._broken = False
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.file, timeout=60, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"The cache {self.file} cannot be used ({error}). Delete that file, or write "
                "cache=FOLDER with another folder."
            ) from None

    def get(self, key: bytes) -> bytes | None:
        """The value stored under a key; None where there is none or it is damaged."""
        try:
            with self._lock:
                row = self._database.execute("SELECT value FROM replies WHERE key = ?", (key,)).fetchone()
            return None if row is None else zlib.decompress(row[0])
        except (sqlite3.Error, zlib.error) as error:
            self._give_up(error)
            return None

    def put(self, key: bytes, value: bytes) -> None:
        """Store a value. A disk that is full costs the entry and a warning, never the run."""
        try:
            with self._lock:
                self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, zlib.compress(value, 1)))
        except sqlite3.Error as error:
            self._give_up(error)

    def generation(self, name: str, probe: list[float], tolerance: float = 0.01) -> int:
        """Which weights stand behind a name: the number of an earlier probe that answered the same, or a new number.

        Args:
            name: what the server says its model is; the same after it was trained further.
            probe: log-probabilities of fixed tokens.
            tolerance: mean difference, in nats, that numerical noise explains.
        """
        with self._lock:
            database = self._database
            database.execute("BEGIN IMMEDIATE")
            try:
                rows = database.execute("SELECT generation, probe FROM models WHERE name = ?", (name,)).fetchall()
                for number, stored in rows:
                    if mean_difference(json.loads(stored), probe) <= tolerance:
                        return number
                database.execute("INSERT INTO models VALUES (?, ?, ?)", (name, len(rows), json.dumps(probe)))
                return len(rows)
            finally:
                database.execute("COMMIT")

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _give_up(self, error: Exception) -> None:
        if not self._broken:
            self._broken = True
            log.warning(
                "the cache %s fails (%s); answers that it cannot give or keep are asked for again", self.file, error
            )


def mean_difference(first: list[float], second: list[float]) -> float:
    """Mean absolute difference; infinite where the lengths differ."""
    if len(first) != len(second):
        return float("inf")
    return sum(abs(a - b) if a != b else 0.0 for a, b in zip(first, second, strict=True)) / max(1, len(first))


def cache_key(identity: str, path: str, body: dict[str, Any], salt: int | None = None) -> bytes:
    """A digest of everything that determines an answer; where the server stands does not."""
    text = json.dumps([identity, path, body, salt], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()
