"""What every export folder has in common: it appears whole or not at all, and its page says how to load it."""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfdistill.errors import UserError
from selfdistill.models.generation import base_model

VERIFICATION = "verification.json"


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary sibling to write to; it takes the name `folder` when the block ends well and is removed when not.

    An earlier export of that name is replaced only then.

    Raises:
        UserError: something that is no export stands in the way.
    """
    folder = Path(folder).absolute()
    if (
        folder.exists()
        and not (folder / VERIFICATION).is_file()
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise UserError(f"{folder} exists and is no export: remove it, or choose another folder.")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        (partial / VERIFICATION).write_text(json.dumps({"verdict": "not verified"}) + "\n")
        if folder.exists():
            earlier = folder.with_name(f".{folder.name}.earlier-{os.getpid()}")
            folder.rename(earlier)
            partial.rename(folder)
            shutil.rmtree(earlier)
        else:
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def base_location(model: Any) -> str:
    """Where the base can be loaded from: the absolute path of a local folder, otherwise its name on the hub."""
    name = base_model(model).name_or_path
    if not name:
        raise ValueError("the base model was not loaded from a folder or a name, so nothing can refer to it")
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def write_companions(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Tokenizer, chat template and generation settings."""
    tokenizer.save_pretrained(folder)
    config = copy.deepcopy(base_model(model).generation_config)
    # Training with gradient checkpointing turns the cache off; whoever uses the export wants it.
    config.use_cache = True
    # Written as it is: save_pretrained refuses settings that some published models come with.
    config.to_json_file(folder / "generation_config.json", use_diff=True)


def write_card(folder: Path, *, title: str, base: str, usage: str, notes: list[str], library: str) -> None:
    """README.md: what it is, the base it needs or came from, how to load it."""
    # A model card's base_model must be a name on the hub; a local path would make the page invalid there.
    header = [] if Path(base).is_absolute() else [f"base_model: {base}"]
    lines = [
        "---", *header, f"library_name: {library}", "pipeline_tag: text-generation", "tags: [selfdistill]", "---", "",
        f"# {title}", "", f"Base model: `{base}`", "", *[f"- {note}" for note in notes],
        f"- `{VERIFICATION}`: how this folder, loaded again, compared with the model that was trained.", "",
        "```python", usage, "```", "",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
