"""Where rows come from: what a path means, and the source that it opens."""

import importlib.resources
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selfdistill.config.suggestions import closest, guess, nearest
from selfdistill.data.readers import BOM, Record, csv_records, hub_records, json_records, jsonl_records, parquet_records
from selfdistill.errors import UserError

READERS = {"jsonl": jsonl_records, "json": json_records, "parquet": parquet_records, "csv": csv_records}
FORMATS = (*READERS, "hub")
EXTENSIONS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
EMBEDDED_PREFIX = "embedded:"
LISTED = 5  # files that a message names at most
# File types that people try and that are not read; without this list `folder/file.txt` would look like a hub name.
OTHER_EXTENSIONS = {
    ".txt", ".tsv", ".md", ".yaml", ".yml", ".xml", ".xlsx", ".xls", ".arrow", ".pkl",
    ".gz", ".zip", ".zst", ".bz2", ".xz", ".tar",
}  # fmt: skip


@dataclass(frozen=True)
class RowSource:
    """The rows of one file or hub dataset. `unit` says what a record's number counts: `line`, or `row` in parquet."""

    name: str
    unit: str
    records: Iterator[Record]

    def place(self, line: int) -> str:
        return f"{self.name}, {self.unit} {line}"


def open_source(
    path: str,
    *,
    key: str,
    format: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    local_files_only: bool = False,
) -> RowSource:
    """Find out what `path` is and open it.

    Args:
        path: a file, `embedded:NAME`, or a hub dataset `owner/name` or `owner/name:split`.
        key: the configuration key that `path` came from, for messages.
        format: one of FORMATS; None goes by the extension, and takes `owner/name` for the hub.

    Raises:
        UserError: nothing readable is there.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"data.format={format}: write one of {', '.join(FORMATS)}{guess(format, FORMATS)}")
    if path.startswith(EMBEDDED_PREFIX):
        return _file_source(embedded_file(path.removeprefix(EMBEDDED_PREFIX), key), path, "jsonl")
    file = Path(path).expanduser()
    try:
        file.exists()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{key}={path}: {error.strerror}.") from None
    format = format or _guess_format(path, file, key)
    if format == "hub":
        return RowSource(path, "row", hub_records(path, key, split, subset, local_files_only))
    if file.is_dir():
        raise UserError(
            f"{key}={path} is a folder. Write the file: {_listing(file)} "
            "(or data.format=hub for a folder that datasets.load_dataset reads)."
        )
    if not file.is_file():
        raise UserError(f"{key}={path}: there is no such file{_near_file(file)}")
    return _file_source(file, path, format)


def _guess_format(path: str, file: Path, key: str) -> str:
    extension = file.suffix.lower()
    if extension in EXTENSIONS:
        return EXTENSIONS[extension]
    if file.is_dir():
        return "jsonl"  # refused by the caller, which says what the folder holds
    if file.is_file() or extension in OTHER_EXTENSIONS:
        raise UserError(
            f"{key}={path}: the extension '{extension}' is not one of {', '.join(EXTENSIONS)}. "
            f"Convert the file, or say what it holds with data.format={'|'.join(FORMATS)}."
        )
    # A name whose folder exists here is a mistyped file rather than a hub dataset.
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", path) and not file.parent.is_dir():
        return "hub"
    raise UserError(
        f"{key}={path}: there is no such file, and it is no hub dataset either (owner/name; for one without an owner, "
        f"data.format=hub){_near_file(file)}"
    )


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"it holds {', '.join(names[:LISTED])}{more}" if names else f"it holds no {', '.join(EXTENSIONS)} file"


def _near_file(file: Path) -> str:
    """The end of a message about a file that does not exist: which one may be meant."""
    if not file.parent.is_dir():
        return f". The folder {file.parent.absolute()} does not exist."
    names = [p.name for p in file.parent.iterdir() if p.is_file()]
    near = nearest(file.name, names)
    return f"; did you mean {near}?" if near else f". In {file.parent.absolute()}: {_listing(file.parent)}."


def embedded_file(name: str, key: str) -> Path:
    """The file of data that comes with the package."""
    folder = Path(str(importlib.resources.files("selfdistill.data"))) / "embedded"
    names = sorted(p.stem for p in folder.glob("*.jsonl"))
    if name not in names:
        raise UserError(f"{key}={EMBEDDED_PREFIX}{name}: the package has no such data; {closest(name, names)}")
    return folder / f"{name}.jsonl"


def _file_source(file: Path, name: str, format: str) -> RowSource:
    if file.stat().st_size == 0:
        raise UserError(f"{name} is empty: it has no rows.")
    format = _by_content(file, format)
    return RowSource(name, "row" if format == "parquet" else "line", READERS[format](file, name))


def _by_content(file: Path, format: str) -> str:
    """What a file holds, where its first bytes tell: parquet, a JSON list, or one JSON object a line."""
    with file.open("rb") as lines:
        if lines.read(4) == b"PAR1":
            return "parquet"
        if format not in ("json", "jsonl"):
            return format
        lines.seek(0)
        written = (line.strip().removeprefix(BOM) for line in lines)
        first = next(filter(None, written), b"")
        if first.startswith(b"["):
            return "json"
        # An object alone in its file is no row: the reader of lists says what is wrong with it.
        return "jsonl" if _is_object(first) and (format == "jsonl" or any(written)) else format


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
