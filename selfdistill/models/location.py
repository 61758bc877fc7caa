"""Where a model is, and how large it is, from its files alone. No heavy imports."""

import json
import re
import struct
from math import prod
from pathlib import Path

from selfdistill.config.suggestions import guess
from selfdistill.errors import UserError

EMBEDDED = "embedded"
WEIGHTS = "*.safetensors"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def look_for_model(name: str, key: str, *, local_files_only: bool = False) -> None:
    """Whether a model can be where its name says; a name that only the hub knows passes.

    Raises:
        UserError: it is a path, and no model lies there.
    """
    if name == EMBEDDED:
        return
    if not name.strip():
        raise UserError(f"{key} is empty: write a folder, a hub name such as Qwen/Qwen3-0.6B, or embedded.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UserError(
                f"{key}={name}: this folder holds no model, for it has no config.json. "
                "Write a folder with config.json and weights, or a hub name."
            )
        return
    if folder.is_file():
        raise UserError(f"{key}={name} is a file: write the folder that it lies in.")
    parts = folder.parts
    is_path = not HUB_NAME.fullmatch(name) or name.startswith((".", "~", "/"))
    if is_path or (len(parts) > 1 and folder.parent.is_dir()):
        above = folder.parent
        if not above.is_dir():
            where = f". The folder {above.absolute()} does not exist either."
        else:
            where = guess(folder.name, [entry.name for entry in above.iterdir() if entry.is_dir()])
        raise UserError(f"{key}={name}: there is no such folder{where}")


def files_of(name: str) -> list[Path]:
    """A model's weight files, from its folder or the hub's local cache; empty where there are none here."""
    if name == EMBEDDED:
        return sorted((Path(__file__).parent / EMBEDDED).glob(WEIGHTS))
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except ValueError:  # no hub name
            return []
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    return sorted(folder.glob(WEIGHTS))


def parameters(name: str) -> int | None:
    """How many parameters a model has, counted from its files' headers; None where they are not here."""
    files = files_of(name)
    try:
        return sum(map(_parameters, files)) or None
    except (OSError, ValueError, KeyError, struct.error):  # not what it says it is: loading says why
        return None


def _parameters(file: Path) -> int:
    with file.open("rb") as weights:
        (length,) = struct.unpack("<Q", weights.read(8))
        header = json.loads(weights.read(min(length, file.stat().st_size)))
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
