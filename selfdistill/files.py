"""Files that are written as a whole."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str) -> None:
    """Write a file so that a reader, or a kill, sees either the old or the new content."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(content.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
