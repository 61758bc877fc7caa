"""A file of JSON lines, each with its step, whose end is repaired where a kill left half a line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from selfdistill.errors import UserError


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
    """Append-only JSON lines with `step`.

    A line goes to the kernel in one call, so that a process that is killed leaves at most its last line incomplete.
    When the file is opened for writing, what follows the last whole line is cut off. Steps come in ascending order.

    Raises:
        UserError: on reading, a line before the last that is not a JSON object.
    """

    def __init__(self, path: Path, write: bool) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._last_start = 0
        self._last: dict[str, Any] | None = None
        if write:
            self._file = self.path.open("r+b" if path.exists() else "x+b", buffering=0)
            self._repair()

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
        if self._last is not None and self._last["step"] == step:
            self._write_at(self._last_start, {**self._last, **jsonable(values), "step": step})
        else:
            self.append({"step": step, **values})

    def truncate(self, step: int) -> int:
        """Drop lines of later steps; returns how many."""
        records = self.read()
        kept = sum(record["step"] <= step for record in records)
        if kept < len(records):
            lines = self.path.read_bytes().splitlines(keepends=True)
            self._open_file().truncate(sum(map(len, lines[:kept])))
            self._repair()
        return len(records) - kept

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_file(self) -> IO[bytes]:
        if self._file is None:
            raise ValueError(f"{self.path} is not open for writing.")
        return self._file

    def _write_at(self, start: int, record: dict[str, Any]) -> None:
        file = self._open_file()
        line = _encode(record)
        file.seek(start)
        file.write(line)
        # A merged line can be shorter than the one it replaces.
        file.truncate(start + len(line))
        self._last_start, self._last = start, record

    def _repair(self) -> None:
        """Cut off what follows the last whole line, and remember that line."""
        file = self._open_file()
        content = self.path.read_bytes()
        self._last, self._last_start = None, 0
        while content:
            start = content.removesuffix(b"\n").rfind(b"\n") + 1
            record = _parse(content[start:])
            if record is not None:
                self._write_at(start, record)
                return
            content = content[:start]
        file.truncate(0)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _encode(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
