"""Reads the records of a W&B offline file.

The file is LevelDB's log format after a header of seven bytes (`:W&B`, a magic number, a version): blocks of 32 KiB,
each a row of chunks with a header of checksum (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last).
"""

import json
from pathlib import Path

from wandb.proto import wandb_internal_pb2 as pb

_BLOCK = 32 * 1024
_HEADER = 7


def records(path: Path) -> list[pb.Record]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    found, position, pending = [], _HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if kind == 0:
            position += left
            continue
        pending += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(pending)
            found.append(record)
            pending = b""
    return found


def history(found: list[pb.Record]) -> list[dict]:
    """The logged rows."""
    rows = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in rows]


def config(found: list[pb.Record]) -> dict:
    """The configuration, as it was last."""
    values = {}
    for record in found:
        kind = record.WhichOneof("record_type")
        updates = record.run.config.update if kind == "run" else record.config.update if kind == "config" else []
        values |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
    return values


def summary(found: list[pb.Record]) -> dict:
    """Summary values that were set by hand."""
    values = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            values |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
            }
    return values
