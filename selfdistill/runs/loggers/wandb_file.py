"""Which steps a W&B file holds: a run that was killed had no time to write all that it logged.

The file is LevelDB's log format after a header of seven bytes (`:W&B`, a magic number, a version): blocks of 32 KiB,
each a row of chunks with a header of checksum (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last).
W&B has no reader of it in Python.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

_BLOCK = 32 * 1024
_HEADER = 7


def records(path: Path) -> Iterator[Any]:
    """The records up to the first that is torn, as `wandb.proto.wandb_internal_pb2.Record`."""
    from wandb.proto import wandb_internal_pb2

    pb: Any = wandb_internal_pb2  # its classes are made when it is imported
    data = path.read_bytes()
    position, pending = _HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if left < _HEADER or kind == 0:
            position += left
            continue
        end = position + _HEADER + length
        if end > len(data):
            return
        pending += data[position + _HEADER : end]
        position = end
        if kind in (1, 4):
            record = pb.Record()
            try:
                record.ParseFromString(pending)
            except DecodeError:
                return
            yield record
            pending = b""


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows, each with `_step`."""
    rows = [record.history for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in rows]


def steps(folder: Path) -> frozenset[int]:
    """The steps in all files of a run's folder `wandb`, whether the run was online or offline then."""
    return frozenset(int(row["_step"]) for path in folder.glob("*/run-*.wandb") for row in history(path))
