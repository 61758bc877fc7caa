"""Rows of JSONL, JSON, CSV and parquet files and of hub datasets, one by one, each with its place in the file.

A problem with one row stands in its record, so that the caller may skip the row; a problem with the whole file is
raised.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdistill.errors import UserError, one_line

if TYPE_CHECKING:
    import pyarrow as pa

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One row as it was read: its value, or the reason why it could not be read."""

    line: int
    value: Any = None
    error: str | None = None


def _encoding_error(error: UnicodeDecodeError, start: int = 0) -> str:
    byte = error.object[error.start]
    return (
        f"is not UTF-8: byte 0x{byte:02x} at byte offset {start + error.start} of the file. "
        "Save the file as UTF-8 (iconv -f latin1 -t utf-8, or the encoding it has)"
    )


def _refuse_utf16(head: bytes, name: str) -> None:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{name}, line 1: the file is UTF-16 (byte offset 0). Save it as UTF-8.")


def _json_error(error: json.JSONDecodeError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "malformed JSON: nested too deeply"
    return f"malformed JSON at column {error.colno}: {error.msg}"


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def jsonl_records(file: Path, name: str) -> Iterator[Record]:
    offset = 0
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            start, offset = offset, offset + len(raw)
            if number == 1:
                _refuse_utf16(raw, name)
                if raw.startswith(BOM):
                    raw, start = raw[len(BOM) :], start + len(BOM)
            try:
                text = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                yield Record(number, error=_encoding_error(error, start))
                continue
            if not text:
                continue
            try:
                yield Record(number, json.loads(text))
            except (json.JSONDecodeError, RecursionError) as error:
                hint = ""
                if text in ("{", "[") or text.startswith(("}", "]")):
                    hint = " (an object must stand on one line; for a list over many lines: data.format=json)"
                yield Record(number, error=_json_error(error) + hint)


def json_records(file: Path, name: str) -> Iterator[Record]:
    """Rows of a JSON list. Values are parsed one after another, so that each knows the line it begins on."""
    data = file.read_bytes()
    _refuse_utf16(data, name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}, line {line}: {_encoding_error(error)}.") from None
    del data
    space, decoder = re.compile(r"\s*"), json.JSONDecoder()

    def skip(position: int) -> int:
        return space.match(text, position).end()  # type: ignore[union-attr]  # matches the empty string too

    position = skip(0)
    if position == len(text):
        return
    if text[position] != "[":
        raise UserError(f"{name}: {_not_a_list(text[position:])}")
    line, counted = 1, 0
    position = skip(position + 1)
    closed = text.startswith("]", position)
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise UserError(f"{name}, line {line}: {_json_error(error)}.") from None
        yield Record(line, value)
        position = skip(position)
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            found = f"found {text[position]!r}" if position < len(text) else "the file ends here"
            problem = f"malformed JSON: ',' or ']' expected after a row, {found}"
            raise UserError(f"{name}, line {_line(text, position)}: {problem}.")
        position = position if closed else skip(position + 1)
    if (position := skip(position + 1)) != len(text):
        raise UserError(f"{name}, line {_line(text, position)}: malformed JSON: text after the end of the list.")


def _not_a_list(text: str) -> str:
    """What to write instead, for a file that holds something else than a list."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return "it holds one JSON object a line, not a JSON list. Write data.format=jsonl."
        return f"line {error.lineno}: a JSON list of rows is expected, [{{…}}, {{…}}]; {_json_error(error)}."
    if isinstance(value, dict):
        lists = [key for key, inner in value.items() if isinstance(inner, list)]
        under = f" Save the list under its key '{lists[0]}' as a file of its own." if lists else ""
        return f"a JSON list of rows is expected, [{{…}}, {{…}}], not one object.{under}"
    return f"a JSON list of rows is expected, [{{…}}, {{…}}], not {type(value).__name__}."


def csv_records(file: Path, name: str) -> Iterator[Record]:
    """Rows of a CSV file with a header. An empty cell is read as no value."""
    csv.field_size_limit(2**31 - 1)  # the module's own limit, 128 KiB a cell, is less than a long text
    with file.open("rb") as head:
        _refuse_utf16(head.read(2), name)
    # Wrong bytes survive decoding as lone surrogates, so that only the row that has them is refused.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        line = 1
        try:
            header = next(reader, [])
            _check_header(header, name)
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield _csv_record(line, cells, header)
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{name}, line {line}: malformed CSV: {error}. Is a quotation mark not closed?") from None


def _csv_record(line: int, cells: list[str], header: list[str]) -> Record:
    if wrong := re.search("[\udc80-\udcff]", "".join(cells)):
        byte = ord(wrong.group()) - 0xDC00
        return Record(line, error=f"is not UTF-8: it has the byte 0x{byte:02x}. Save the file as UTF-8")
    if len(cells) != len(header):
        problem = f"has {len(cells)} cells, the header has {len(header)} ({', '.join(header)})"
        return Record(line, error=f"{problem}. Put cells that contain a comma in quotation marks")
    return Record(line, {field: cell or None for field, cell in zip(header, cells, strict=True)})


def _check_header(header: Sequence[str], name: str) -> None:
    text = "".join(header)
    if wrong := re.search("[\udc80-\udcff]", text):
        byte = ord(wrong.group()) - 0xDC00
        raise UserError(f"{name}, line 1: is not UTF-8: it has the byte 0x{byte:02x}. Save the file as UTF-8.")
    if "\0" in text:
        raise UserError(f"{name}, line 1: the name of a column has a NUL character. Is this a text file?")
    if not any(cell.strip() for cell in header):
        raise UserError(f"{name}, line 1: a CSV file begins with the names of its columns, and this line has none.")
    twice = next((cell for cell in header if header.count(cell) > 1), None)
    if twice is not None:
        raise UserError(f"{name}, line 1: two columns are named '{one_line(twice)}'. Rename one.")
    other = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
    if other:
        raise UserError(f"{name}, line 1: the columns are separated by {other!r}. Save the file with commas.")


def parquet_records(file: Path, name: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    record = Record(0)
    try:
        for record in _numbered(pq.ParquetFile(file).iter_batches(batch_size=1000)):
            yield record
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} can't be read as parquet, after {record.line} rows: {reason}") from None


def _numbered(tables: Iterable["pa.Table | pa.RecordBatch"]) -> Iterator[Record]:
    rows = (row for table in tables for row in table.to_pylist())
    return (Record(number, row) for number, row in enumerate(rows, start=1))


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """No request to the hub inside, when wanted: what is cached is used. The library reads this flag at each call."""
    import datasets.config

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def hub_records(path: str, key: str, split: str | None, subset: str | None, local_files_only: bool) -> Iterator[Record]:
    import datasets

    if not Path(path).exists():
        path, _, named_split = path.partition(":")
        split = named_split or split
    try:
        with _offline(local_files_only):
            dataset = datasets.load_dataset(path, name=subset, split=split)
    except Exception as error:  # the library raises many kinds, each for something that the user can change
        raise UserError(f"{key}={path}: {_hub_error(error, subset, split, local_files_only)}") from error
    if not isinstance(dataset, datasets.Dataset):
        splits = list(dataset)
        if len(splits) > 1 and "train" not in splits:
            raise UserError(f"{key}={path} has the splits {', '.join(splits)}. Write data.split=one of them.")
        dataset = dataset["train" if "train" in splits else splits[0]]
    yield from _numbered(dataset.with_format("arrow").iter(batch_size=1000))


def _hub_error(error: Exception, subset: str | None, split: str | None, local_files_only: bool) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ConnectionError):
        if local_files_only:
            return (
                "the dataset is not in the local cache, and local_files_only forbids downloading it. Load it once with "
                "model.local_files_only=false, or give a file."
            )
        return f"the hub can't be reached ({text}). Give a file, or load the dataset once where there is a connection."
    if "BuilderConfig" in text or "Config name is missing" in text:
        return f"no subset {subset!r}: {text} Write data.subset=one of them."
    if "Unknown split" in text:
        return f"no split {split!r}: {text} Write data.split=one of them."
    return f"the dataset can't be loaded: {text}"
