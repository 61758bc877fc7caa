"""What the page of a run's model says: the run's choices, its data, and what it could do before and after."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from selfdistill.models.card import CARD, Card, base_of, write_card
from selfdistill.models.location import EMBEDDED
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.labels import labels_of

IN_PACKAGE = "embedded (the model in the package selfdistill)"


def card_of(run: Mapping[str, Any], folder: RunFolder, rows: int | None) -> Card:
    """The card of a run's model before it is trained: everything but results.

    Args:
        run: its configuration, as plain mappings.
        rows: how many rows it is trained on, where that is known.
    """
    choices = labels_of(folder.path).chosen
    name, data = run["model"]["name"], run.get("data") or {}
    reward, teacher = ((run.get(group) or {}).get("_target_", "") for group in ("reward", "teacher"))
    source = data.get("path") or data.get("_target_")
    facts = {
        "method": f"`{choices['experiment']}`" if "experiment" in choices else "",
        "reward": f"`{choices.get('reward') or reward}`" if reward else "",
        "teacher": f"`{choices.get('teacher') or teacher}`" if teacher else "",
        "data": f"`{source}`" + (f", {rows:,} rows" if rows is not None else "") if source else "",
        "steps": str(run.get("max_steps") or ""),
        "run": f"`{folder.run_id}`, seed {run.get('seed')}; its configuration is in `config.yaml` of the run's folder",
    }
    return Card(folder.run_id, IN_PACKAGE if name == EMBEDDED else base_of(name), facts)


def card_for_export(card: Card, folder: RunFolder, *, evaluated: bool = True) -> Card:
    """The card with what is known when the run is over: its results, unless another step is exported; configuration."""
    configuration = (folder.path / "config.yaml").read_text(encoding="utf-8")
    return replace(card, results=results_of(folder) if evaluated else {}, configuration=configuration)


def results_of(folder: RunFolder) -> dict[str, tuple[float | None, float | None]]:
    """Each metric of the evaluation before and after; empty where the end was not evaluated."""
    found = folder.summary.get("eval") or {}
    before, after = found.get("before") or {}, found.get("after") or {}
    return {name: (before.get(name), after.get(name)) for name in sorted({*before, *after})} if after else {}


def add_results(card: Card, folder: RunFolder) -> None:
    """Writes the evaluation before and after into the page of the run's model, where both are known."""
    results = results_of(folder)
    if results and (folder.path / "model" / CARD).is_file():
        write_card(folder.path / "model", replace(card, results=results))
