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
    """Where the base can be loaded from: the absolute path of a local folder, otherwise its name on the hub.

    Raises:
        ValueError: the base was made in memory.
    """
    name = base.name_or_path
    if not name:
        raise ValueError("the base model was not loaded from a folder or a name, so nothing can refer to it")
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def write_companions(trained: TransformersModel, folder: Path) -> None:
    """Write tokenizer, chat template and generation settings."""
    trained.tokenizer.save_pretrained(folder)
    config = copy.deepcopy(trained.base.generation_config)
    # Training with gradient checkpointing turns the cache off; whoever uses the export wants it.
    config.use_cache = True
    # Not through save_pretrained, which refuses settings that some published models come with.
    config.to_json_file(folder / "generation_config.json", use_diff=True)


def write_card(folder: Path, *, title: str, base: str, loader: str, notes: list[str]) -> None:
    """Write README.md: what the export is, the base it needs or was made of, and how to load it.

    Args:
        loader: the class that loads it, with its package, such as "transformers.AutoModelForCausalLM".
    """
    library, _, name = loader.rpartition(".")
    # A model card's base_model must be a name on the hub; a local path would make the page invalid there.
    header = [] if Path(base).is_absolute() else [f"base_model: {base}"]
    lines = [
        "---", *header, f"library_name: {library}", "pipeline_tag: text-generation", "tags: [selfdistill]", "---", "",
        f"# {title}", "", f"Base model: `{base}`", "", *[f"- {note}" for note in notes],
        f"- `{VERIFICATION}`: how this folder, loaded again, compared with the model that was trained.", "",
        "```python", f"from {library} import {name}", "from transformers import AutoTokenizer", "",
        f'model = {name}.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")', "```", "",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
