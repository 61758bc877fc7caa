"""A file of JSON lines, each with its step, which is put right where a kill or a full disk left half a line."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from selfdistill.errors import UserError
from selfdistill.files import write_atomically, write_whole


def jsonable(value: Any) -> Any:
    """`value` as plain JSON values: NaN and infinities become None, arrays and tensors numbers, the rest text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    return str(value)


class StepLog:
    """Append-only JSON lines with `step`, in ascending order.

    A line is written at once, so that a process that is killed leaves at most its last line incomplete; the last line
    is replaced by way of a second file. When the file is opened for writing, what a kill or a full disk left in it is
    put right: what follows the last whole line is cut off, and a torn line before it is left out.

    Raises:
        UserError: on reading, a line before the last that is not a JSON object; on writing, the file is gone.
        OSError: it cannot be written; what was in it is still there.
    """

    def __init__(self, path: Path, write: bool) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._last_start = 0
        self._last: dict[str, Any] | None = None
        if write:
            self._file = self._opened()
            self._repair()

    @property
    def last_step(self) -> int | None:
        """The step of the last line of a log that is open for writing."""
        return None if self._last is None else int(self._last["step"])

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; an incomplete last line is left out."""
        if not self.path.exists():
            return []
        records = [_parse(line) for line in self.path.read_bytes().split(b"\n")]
        while records and records[-1] is None:
            records.pop()
        if None in records:
            raise UserError(f"{self.path}, line {records.index(None) + 1}: this is not a JSON object.")
        return [record for record in records if record is not None]

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line."""
        self._write_at(self._open_file().seek(0, os.SEEK_END), jsonable(record))

    def merge(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the last line if it is that of `step`, otherwise add a line."""
        if self._last is None or self._last["step"] != step:
            self.append({"step": step, **values})
            return
        record = {**self._last, **jsonable(values), "step": step}
        write_atomically(self._replacement, json.dumps({"start": self._last_start, "record": record}))
        self._write_at(self._last_start, record)
        self._replacement.unlink()

    def truncate(self, step: int) -> int:
        """Drop lines of later steps; returns how many."""
        records = self.read()
        kept = sum(record["step"] <= step for record in records)
        if kept < len(records):
            lines = self.path.read_bytes().splitlines(keepends=True)
            self._open_file().truncate(sum(map(len, lines[:kept])))
            self._repair()
        return len(records) - kept

    def check(self) -> None:
        """Raises UserError where the file was deleted or moved while it is open for writing."""
        try:
            there, ours = self.path.stat(), os.fstat(self._open_file().fileno())
        except OSError:
            there, ours = None, None
        if there is None or ours is None or (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            raise UserError(f"{self.path} is gone: it was deleted or moved while the run was writing to it.")

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _replacement(self) -> Path:
        """Holds the new last line while the old one is overwritten."""
        return self.path.with_name(f".{self.path.name}.last-line")

    def _opened(self) -> IO[bytes]:
        return self.path.open("r+b" if self.path.exists() else "x+b", buffering=0)

    def _open_file(self) -> IO[bytes]:
        if self._file is None:
            raise ValueError(f"{self.path} is not open for writing.")
        return self._file

    def _write_at(self, start: int, record: dict[str, Any]) -> None:
        self.check()
        file = self._open_file()
        line = _encode(record)
        try:
            write_whole(file.fileno(), line, start)
        except OSError:
            replaced = _encode(self._last) if self._last is not None and self._last_start == start else b""
            write_whole(file.fileno(), replaced, start)  # in the place that it had
            file.truncate(start + len(replaced))
            raise
        # A merged line can be shorter than the one it replaces.
        file.truncate(start + len(line))
        self._last_start, self._last = start, record

    def _repair(self) -> None:
        """Put right what a kill or a full disk left, and remember the last line."""
        self._finish_replacement()
        content = self.path.read_bytes()
        lines = content.split(b"\n")[:-1] if content.endswith(b"\n") else content.split(b"\n")
        while lines and _mended(lines[-1]) is None:
            lines.pop()
        mended = [line for line in map(_mended, lines) if line is not None]
        whole = b"".join(line + b"\n" for line in mended)
        if mended != lines:
            torn = next(i for i, line in enumerate(lines, start=1) if _parse(line) is None)
            warnings.warn(f"{self.path}, line {torn}, was torn by an earlier fault and is left out.", stacklevel=2)
            self.close()
            write_atomically(self.path, whole.decode("utf-8"))
            self._file = self._opened()
        elif whole != content:
            file = self._open_file()
            file.truncate(min(len(whole), len(content)))
            write_whole(file.fileno(), whole[len(content) :], len(content))
        self._last = _parse(mended[-1]) if mended else None
        self._last_start = len(whole) - len(mended[-1]) - 1 if mended else 0

    def _finish_replacement(self) -> None:
        try:
            replacement = json.loads(self._replacement.read_bytes())
        except FileNotFoundError:
            return
        self._last = None
        self._write_at(replacement["start"], replacement["record"])
        self._replacement.unlink()


def _mended(line: bytes) -> bytes | None:
    """A line, or the record that was appended to a torn one; None where nothing of it can be read."""
    if _parse(line) is not None:
        return line
    start = line.rfind(b'{"step":')
    return line[start:] if start > 0 and _parse(line[start:]) is not None else None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _encode(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
