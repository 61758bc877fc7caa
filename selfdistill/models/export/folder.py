"""What every export folder has in common: it appears whole or not at all, and its page says how to load it."""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from selfdistill.errors import UserError
from selfdistill.files import draft_of, replace_folder
from selfdistill.models.card import base_of
from selfdistill.models.export.verify import VERIFICATION, TransformersModel


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary sibling to write to; it takes the name `folder` when the block ends well and is removed when not.

    An earlier export of that name is replaced only then.

    Raises:
        UserError: something that is no export stands in the way.
    """
    folder = Path(folder).absolute()
    is_export = (folder / VERIFICATION).is_file()
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_export and not is_empty:
        raise UserError(f"{folder} exists and is no export: remove it, or choose another folder.")
    partial = draft_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        (partial / VERIFICATION).write_text(json.dumps({"verdict": "not verified"}) + "\n")
        replace_folder(folder, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def base_location(base: PreTrainedModel) -> str:
    """Where the base can be loaded from: the absolute path of a local folder, or its name on the hub; else empty."""
    return base_of(base.name_or_path or "")


def write_companions(trained: TransformersModel, folder: Path) -> None:
    """Write tokenizer, chat template and generation settings."""
    trained.tokenizer.save_pretrained(folder)
    config = copy.deepcopy(trained.base.generation_config)
    # Training with gradient checkpointing turns the cache off; whoever uses the export wants it.
    config.use_cache = True
    # Not through save_pretrained, which refuses settings that some published models come with.
    config.to_json_file(folder / "generation_config.json", use_diff=True)
