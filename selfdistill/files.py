"""Files and folders that are there as a whole or not at all, whenever their process is killed."""

import os
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

_DRAFT = re.compile(r"\..+\.partial-(?P<host>.+)-(?P<process>\d+)")
DAY_S = 86_400.0


def draft_of(path: Path) -> Path:
    """Where a process writes what is to become `path`: a hidden sibling whose name says which process is writing."""
    return path.with_name(f".{path.name}.partial-{socket.gethostname()}-{os.getpid()}")


def write_atomically(path: Path, content: str) -> None:
    """Write a file so that a reader, or a kill, sees either the old or the new content.

    Raises:
        OSError: it cannot be written; the old content is still there, and nothing else.
    """
    draft = draft_of(path)
    try:
        with draft.open("wb") as file:
            file.write(content.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise


def write_whole(file: int, content: bytes, offset: int) -> None:
    """Write all of `content` at `offset`: the kernel takes a part of it where the disk is nearly full, and says so.

    Raises:
        OSError: there is no place for the rest.
    """
    written = 0
    while written < len(content):
        written += os.pwrite(file, content[written:], offset + written)


def replace_folder(folder: Path, draft: Path) -> None:
    """Put the folder `draft` in the place of `folder`; what was there is gone afterwards."""
    earlier = draft_of(folder.with_name(f"{folder.name}.earlier"))
    with suppress(FileNotFoundError):
        folder.rename(earlier)
    draft.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def remove_drafts(folder: Path, *, all_abandoned: bool = False) -> None:
    """Remove what killed processes were writing in a folder when they ended.

    Args:
        all_abandoned: whether nobody else can be writing there. Without it a draft stays while a process of its number
            runs on this machine, and for a day where another machine made it.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        made_by = _DRAFT.fullmatch(path.name)
        if made_by and (all_abandoned or _abandoned(path, made_by["host"], int(made_by["process"]))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _abandoned(path: Path, host: str, process: int) -> bool:
    if host != socket.gethostname():
        with suppress(OSError):
            return time.time() - path.stat().st_mtime > DAY_S
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's process
        return False
    return False


def disk_space(folder: Path) -> str:
    """For a message about a file that could not be written: how much of the disk is left, where that may be why."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return f" ({free / 1024**2:.1f} MiB are free on the disk of {folder})" if free < 1024**3 else ""
