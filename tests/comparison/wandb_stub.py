"""W&B's API with the runs of local folders, as W&B gives back what the logger sent."""

from pathlib import Path
from typing import Any

import orjson
import yaml

from selfdistill.comparison.reading import _run_folders


class Run:
    """What is read of a `wandb.apis.public.Run`."""

    def __init__(self, folder: Path) -> None:
        summary = orjson.loads((folder / "summary.json").read_bytes())
        written = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
        pairs = [override for override in written if "=" in override and not override.startswith("hydra")]
        choices = dict(pair.split("=", 1) for pair in pairs)
        self.id, self.path, self.state = folder.name, ["me", "selfdistill", folder.name], "finished"
        self.group, self.created_at = folder.parent.name, summary["started"]
        self.name = " ".join(["sdpo", *(pair for pair in pairs if not pair.startswith(("experiment=", "max_steps=")))])
        flat = _flat(yaml.safe_load((folder / "config.yaml").read_text()))
        self.config = {**flat, "experiment": choices.get("experiment"), "model": "tiny"}
        sides = {
            f"{side}/{name.removeprefix('eval/')}": value
            for side, metrics in (summary.get("eval") or {}).items()
            for name, value in metrics.items()
        }
        known = {"status": summary["status"], "step": 12, "wall_s": summary["wall_s"]}
        self.summary = {**known, "peak_memory_gib/rss": 0.7, **sides, "completions": {"_type": "table-file"}}
        self._lines = [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]

    def scan_history(self) -> Any:
        for line in self._lines:
            yield {**line, "_step": line["step"], "_runtime": 1.0, "completions": {"_type": "table-file"}}


class Api:
    """A `wandb.Api` for one project."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def runs(self, path: str, filters: dict[str, Any]) -> list[Run]:
        self.asked.append((path, filters))
        return [Run(folder) for folder in _run_folders(self.folder)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
