"""What the page of a run's model says: the run's choices, its data, and what it could do before and after."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from selfdistill.config import Run
from selfdistill.data import DataSplits
from selfdistill.models.card import CARD, Card, base_of, write_card
from selfdistill.models.location import EMBEDDED
from selfdistill.runs.folder import RunFolder

IN_PACKAGE = "embedded (the model in the package selfdistill)"


def choices_of(folder: Path) -> dict[str, Any]:
    """Which option of each group a run was composed of, as its .hydra folder has it; empty where it has none."""
    try:
        choices: Any = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.choices)
    except (OSError, YAMLError, OmegaConfBaseException):
        return {}
    return choices if isinstance(choices, dict) else {}


def card_of(run: Run, folder: RunFolder, data: DataSplits) -> Card:
    """The card of a run's model before it is trained: everything but results."""
    choices = {group: option for group, option in choices_of(folder.path).items() if option not in (None, "none")}
    name = run.model.name
    reward = (run.reward or {}).get("_target_", "")
    teacher = (run.teacher or {}).get("_target_", "")
    facts = {
        "method": f"`{choices['experiment']}`" if "experiment" in choices else "",
        "reward": f"`{choices.get('reward') or reward}`" if reward else "",
        "teacher": f"`{choices.get('teacher') or teacher}`" if teacher else "",
        "data": f"`{run.data.get('path') or run.data['_target_']}`, {len(data.train):,} rows",
        "steps": f"{run.max_steps}",
        "run": f"`{folder.run_id}`, seed {run.seed}; its configuration is in `config.yaml` of the run's folder",
    }
    return Card(folder.run_id, IN_PACKAGE if name == EMBEDDED else base_of(name), facts)


def add_results(card: Card, folder: RunFolder) -> None:
    """Writes the evaluation before and after into the page of the run's model, where both are known."""
    found = folder.summary.get("eval") or {}
    before, after = found.get("before") or {}, found.get("after") or {}
    if not after or not (folder.path / "model" / CARD).is_file():
        return
    results = {name: (before.get(name), after.get(name)) for name in sorted({*before, *after})}
    write_card(folder.path / "model", replace(card, results=results))
