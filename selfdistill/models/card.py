"""The page of a saved model, README.md: what it is, what it was made of and by, what it can do, how it is loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from selfdistill.files import write_atomically
from selfdistill.models.location import HUB_NAME

CARD = "README.md"
ADAPTER = "adapter_config.json"
PACKAGES = ("selfdistill", "torch", "transformers", "trl", "peft")


@dataclass(frozen=True)
class Card:
    """What is said of a model beside what its folder shows.

    Attributes:
        title: the page's headline.
        base: hub name or folder of the model that it was made of.
        facts: what was chosen, for example {"method": "sdpo", "data": "my.jsonl, 400 rows", "reward": "exact_match"}.
        results: metrics before and after the training.
        notes: further sentences.
        library: the package that loads it; found from the folder where empty, and so is the code that loads it.
        configuration: the run's, as YAML.
        usage: Markdown that says how it is loaded, in place of that code.
    """

    title: str
    base: str
    facts: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    library: str = ""
    usage: str = ""
    configuration: str = ""


def base_of(name: str) -> str:
    """Where a base model is found from any folder: the absolute path of a local one, otherwise its name on the hub."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def finish_folder(folder: Path, card: Card) -> None:
    """Makes a saved model usable from anywhere: an adapter's base by its absolute path, our page in PEFT's place."""
    config_file = folder / ADAPTER
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base_of(config.get("base_model_name_or_path") or card.base)
        write_atomically(config_file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_card(folder, card)


def write_card(folder: Path, card: Card) -> None:
    """Writes the page of the model in this folder."""
    adapter = (folder / ADAPTER).is_file()
    library, loader = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    # A page on the hub links its base_model, so that a folder of this machine has no place there.
    local = Path(card.base).is_absolute()
    on_hub = HUB_NAME.fullmatch(card.base) is not None and not local
    header = ["---", *([f"base_model: {card.base}"] if on_hub else []), f"library_name: {card.library or library}"]
    header += ["pipeline_tag: text-generation", "tags: [selfdistill]", "---", ""]
    kind = "LoRA adapter, which works on top of its base alone" if adapter else "whole model"
    facts = {"base model": f"`{card.base}`", "what it is": kind, **card.facts, "versions": versions()}
    lines = [*header, f"# {card.title}", "", *(f"- {name}: {value}" for name, value in facts.items() if value)]
    lines += [f"- {note}" for note in card.notes]
    if adapter and local:
        lines.append(f"- Elsewhere, change `base_model_name_or_path` in `{ADAPTER}` to where the base lies there.")
    if card.results:
        lines += ["", "| metric | before | after |", "|---|---|---|"]
        lines += [f"| {name} | {_number(old)} | {_number(new)} |" for name, (old, new) in card.results.items()]
    lines += ["", "## How to load it", "", card.usage or python_usage(library, loader), ""]
    if card.configuration:
        lines += ["## The run's configuration", "", "<details>", "", "```yaml", card.configuration.strip(), "```", ""]
        lines += ["</details>", ""]
    write_atomically(folder / CARD, "\n".join(lines))


def python_usage(library: str, loader: str) -> str:
    """The Markdown of a block of code that loads the folder with a class of this package."""
    lines = ["```python", f"from {library} import {loader}", "from transformers import AutoTokenizer", ""]
    lines += [f'model = {loader}.from_pretrained("THIS_FOLDER")']
    return "\n".join([*lines, 'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")', "```"])


WHOLE_MODEL_USAGE = f"{python_usage('transformers', 'AutoModelForCausalLM')}\n\nvLLM: `vllm serve THIS_FOLDER`"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def versions() -> str:
    """The packages that made the model, as far as they are installed."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
