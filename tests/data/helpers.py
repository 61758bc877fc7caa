"""Small files and short calls for the tests of the data."""

import copy
import json
from pathlib import Path
from typing import Any

from selfdistill.data import DataSplits, load_data
from tests.tiny import tiny_tokenizer


def tokenizer() -> Any:
    """A copy, because a chat template may be set on it."""
    return copy.deepcopy(tiny_tokenizer())


def load(path: Path | str, **settings: Any) -> DataSplits:
    return load_data(path=str(path), tokenizer=settings.pop("tokenizer", None) or tokenizer(), **settings)


def rows(count: int = 20, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "answer": f"answer {i}", **fields} for i in range(count)]


def jsonl(folder: Path, values: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path


def everything(splits: DataSplits) -> list[dict[str, Any]]:
    """Rows of both sides in the order of their ids."""
    return sorted([*splits.train, *splits.eval], key=lambda row: (len(row["id"]), row["id"]))
