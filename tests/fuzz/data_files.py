"""Damaged and odd data files: each is read as an independent reader reads it, or refused with file and line.

python -m tests.fuzz.data_files [COUNT] [SEED]
"""

import csv
import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.forks import Row, counted, empty_folder, table

COUNT, SEED = 1900, 0
LONGEST_LINE = 4000
FORMATS = ("jsonl", "json", "csv", "parquet")
TEXTS = (
    "a", "two words", "ä", "日本", "🙂", " ", "", "x" * 3000, "line\nbreak", 'quote"', "comma,", "semi;colon",
    "\\u0000",
    "{{7*7}}", "{prompt}", "<|end|>", "null", "1", "\ufeff", "\u200f", "e\u0301", "tab\t", "'", "\r\n",
    "\x1b[31m", "\ud83d",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *TEXTS, None, True, 0, -1, 1.5, 10**30, float("nan"), float("inf"), [], ["a"], [1], {}, {"a": 1}, [[]],
    [{"role": "user"}],
    [{"role": "user", "content": "q"}], [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    [{"role": "system", "content": "s"}], [{"role": "robot", "content": "s"}], "x" * 300_000, ["x" * 300_000],
)  # fmt: skip
FIELDS = ("prompt", "answer", "golden_response", "id", "system", "messages", "text", "other", "n", "completions", "a.b")
NAMES = ("", " ", "\x00", "prompt ", "Prompt", "🙂", "k" * 100_000, "a.b", "\ud83d", "prompts", "None")
BYTES = (
    b"\xff", b"\xe9", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"\\", b"{", b"[", b"\n", b"\r", b",", b"PAR1",
    b"\xf0\x9f",
)  # fmt: skip


def good_rows(draw: random.Random) -> list[dict[str, Any]]:
    count = draw.randrange(3, 12)
    rows: list[dict[str, Any]] = [{"prompt": f"question {i}", "answer": f"answer {i}"} for i in range(count)]
    for row in rows if draw.random() < 0.5 else []:
        row["golden_response"] = [f"it is {row['answer']}"]
    return rows


def mutated(rows: list[dict[str, Any]], draw: random.Random) -> None:
    """Up to three changes of values, names and rows."""
    for _ in range(draw.randrange(1, 4)):
        row, field = draw.choice(rows), draw.choice(FIELDS)
        change = draw.randrange(6)
        if change < 3:
            row[field] = draw.choice(VALUES)
        elif change == 3:
            row.pop(field, None)
        elif change == 4:
            row[draw.choice(NAMES)] = draw.choice(TEXTS)
        else:
            for other in rows:
                other[field] = draw.choice(VALUES)


def written(rows: list[dict[str, Any]], kind: str, draw: random.Random) -> bytes:
    """The rows in a format, as far as it can hold them."""
    if kind == "jsonl":
        return "".join(json.dumps(row) + draw.choice("\n\n\n\r\n"[:3]) for row in rows).encode()
    if kind == "json":
        return json.dumps(rows, indent=draw.choice((None, 1))).encode()
    if kind == "csv":
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode("utf-8", "replace")
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), buffer)
    except Exception:  # what the format cannot hold is no file
        return b"PAR1"
    return buffer.getvalue()


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes of a file with something cut, put in, doubled or exchanged."""
    at = draw.randrange(len(content) + 1)
    damage = draw.randrange(5)
    if damage == 0:
        return content[:at]
    if damage == 1:
        return content[:at] + draw.choice(BYTES) + content[at:]
    if damage == 2:
        return content[:at] + draw.choice(BYTES) + content[at + 1 :]
    if damage == 3:
        return content + content
    return content.decode("utf-8", "replace").encode(draw.choice(("utf-16", "latin-1", "utf-8-sig")), "replace")


def files(count: int, seed: int) -> Iterator[tuple[str, bytes, str]]:
    """Kinds of files, their content, and what is to be done with bad rows."""
    draw = random.Random(seed)
    for index in range(count):
        kind, rows = FORMATS[index % len(FORMATS)], good_rows(draw)
        if draw.random() < 0.7:
            mutated(rows, draw)
        content = written(rows, kind, draw)
        if draw.random() < 0.4:
            content = damaged(content, draw)
        yield kind, content, draw.choice(("error", "skip"))


def independently(file: Path, kind: str) -> list[Any] | None:
    """The file's rows as a few lines of the standard library read them; None where they cannot."""
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            return list(pq.read_table(file).to_pylist())
        text = file.read_bytes().decode("utf-8-sig")
        if kind == "csv":
            return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except Exception:
        return None


def judged(file: Path, kind: str, on_bad_row: str, load: Callable[..., Any]) -> tuple[str, str]:
    """The outcome in a word, and what is wrong with it, if anything."""
    from selfdistill.errors import UserError

    what = f"{file.name}, data.on_bad_row={on_bad_row}"
    try:
        splits = load(file, on_bad_row=on_bad_row, max_prompt_tokens=512)
    except UserError as error:
        message = str(error)
        if len(message) > LONGEST_LINE or "\n" in message:
            return "too long", f"{what}: a message of {len(message)} characters, {message.count(chr(10))} line ends"
        # The split has no line to name: all rows together are too few for it.
        if file.name not in message and "eval_fraction" not in message:
            return "no place", f"{what}: {message[:200]}"
        return "refused", ""
    except Exception as error:
        return "exception", f"{what}: {type(error).__name__}: {str(error)[:200]}"
    read = sorted([*splits.train, *splits.eval], key=lambda row: row["id"])
    rows = independently(file, kind)
    if rows is None:
        return "read", "" if splits.bad_rows else f"{what}: read, though the standard library cannot"
    if len(read) + len(splits.bad_rows) != len(rows):
        return "wrong count", f"{what}: {len(read)} read and {len(splits.bad_rows)} bad, of {len(rows)}"
    texts = {str(row.get("prompt") or row.get("text")) for row in rows if isinstance(row, dict)}
    for row in read:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        if prompt not in texts and not any("messages" in r or isinstance(r.get("prompt"), list) for r in rows):
            return "wrong reading", f"{what}: a prompt that is not in the file: {prompt[:80]!r}"
    return ("read" if not splits.bad_rows else "read, bad rows skipped"), ""


def rows(count: int = COUNT, seed: int = SEED) -> list[Row]:
    """What came of so many files; the same ones for the same seed."""
    from tests.data.helpers import load

    outcomes: dict[str, list[tuple[str, str]]] = {}
    with empty_folder() as folder:
        for index, (kind, content, on_bad_row) in enumerate(files(count, seed)):
            file = folder / f"file{index}.{kind}"
            file.write_bytes(content)
            outcomes.setdefault(kind, []).append(judged(file, kind, on_bad_row, load))
            file.unlink()
    return [counted(f"data files: {kind}", found) for kind, found in outcomes.items()]


if __name__ == "__main__":
    print(table(rows(*map(int, sys.argv[1:]))))
