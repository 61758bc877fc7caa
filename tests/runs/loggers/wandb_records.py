"""What a W&B file says, as its tests ask."""

import json
import time
from pathlib import Path
from typing import Any

from selfdistill.runs.loggers.wandb_file import history, records

__all__ = ["complete", "config", "exits", "history", "metrics", "records", "summary"]


def config(path: Path) -> dict[str, Any]:
    """The configuration, as it was last."""
    values: dict[str, Any] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        updates = record.run.config.update if kind == "run" else record.config.update if kind == "config" else []
        values |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
    return values


def summary(path: Path) -> dict[str, Any]:
    """The summary, as it was last."""
    values: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            values |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
            }
    return values


def metrics(path: Path) -> dict[str, tuple[str, set[str]]]:
    """Of each defined metric its x-axis and what the summary keeps of it."""
    found = [record.metric for record in records(path) if record.WhichOneof("record_type") == "metric"]
    return {
        metric.name or metric.glob_name: (metric.step_metric, {field.name for field, _ in metric.summary.ListFields()})
        for metric in found
    }


def complete(path: Path) -> Path:
    """The file of a finished run: W&B's own process writes the last records after `finish` has returned."""
    for _ in range(300):
        if exits(path):
            return path
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def exits(path: Path) -> list[Any]:
    """The exit record of a run that is complete."""
    return [record.exit for record in records(path) if record.WhichOneof("record_type") == "exit"]
