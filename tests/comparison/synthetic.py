"""Runs' folders as a sweep leaves them, made up: with these values, in milliseconds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.reference import ROOT

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
FULL = yaml.safe_load((ROOT / "tests" / "configs" / "sdpo.yaml").read_text())
# What the tests change, so that they read and write little.
SMALL = {
    key: FULL[key] for key in FULL if "." not in key or key.startswith(("data.", "eval.m", "model.n", "distillation.a"))
}


def write_run(
    folder: Path,
    overrides: Mapping[str, Any],
    *,
    accuracy: float | None = 0.5,
    retention: float | None = 0.9,
    status: str = "finished",
    steps: int = 12,
    verdicts: Sequence[bool] | None = None,
    alarms: Sequence[Mapping[str, Any]] = (),
    error: str | None = None,
    minute: int = 0,
    provenance: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] = SMALL,
) -> Path:
    """One run.

    Args:
        overrides: keys as on the command line; a group's choice is no key of the configuration.
        verdicts: of the task's items at the last evaluation.
        minute: when it started.
    """
    (folder / ".hydra").mkdir(parents=True)
    values = {"max_steps": steps, **{key: value for key, value in overrides.items() if key in base}}
    if "alpha" in values:
        values["distillation.alpha"] = values["alpha"]
    (folder / "config.yaml").write_text(yaml.dump(_nested({**base, **values}), Dumper=DUMPER))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.dump([f"{key}={value}" for key, value in overrides.items()]))
    after: dict[str, float] = {}
    if accuracy is not None:
        after["eval/accuracy"] = accuracy
    if retention is not None:
        after |= {"eval/retention": retention, "eval/retention/sort": retention, "eval/forgetting": 1 - retention}
    summary = {
        "run_id": folder.name,
        "status": status,
        "started": f"2026-11-21T{10 + minute // 60:02}:{minute % 60:02}:00+00:00",
        "wall_s": 20.0,
        "peak_memory_gib": {"rss": 0.7},
        "command": "python -m selfdistill.train --multirun",
        "git": {"commit": "c0ffee", "changed": False},
        "versions": {"torch": "2.13.0"},
        "host": "here",
        "alarms": list(alarms),
        "eval": {"before": {"eval/accuracy": 0.3}, "after": after} if status == "finished" else {},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    reached = steps if status == "finished" else steps // 2
    lines = [_line(step, accuracy or 0.0) for step in range(1, reached + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if verdicts is not None:
        items = [
            {"step": steps, "suite": None, "row": row, "prompt": f"p{row}", "answer": "a", "verdict": verdict}
            for row, verdict in enumerate(verdicts)
        ]
        (folder / "evaluation.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    if error is not None:
        (folder / "error.txt").write_text(f"Traceback\n  somewhere\n{error}\n")
    if provenance is not None:
        (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def write_sweep(
    folder: Path,
    grid: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    *,
    steps: int = 12,
    base: Mapping[str, Any] = SMALL,
) -> None:
    """A run for each setting and seed; accuracy grows with alpha, and runs of one seed are alike."""
    rng = np.random.default_rng(0)
    luck = {seed: rng.normal(0, 0.03) for seed in seeds}
    for number, setting in enumerate(grid):
        for seed in seeds:
            accuracy = 0.6 + 0.1 * float(setting.get("alpha", 0)) + luck[seed] + rng.normal(0, 0.01)
            overrides = {"experiment": "sdpo", **setting, "seed": seed}
            write_run(
                folder / f"run-{number}-{seed}",
                overrides,
                accuracy=round(float(accuracy), 3),
                retention=round(0.9 - 0.02 * float(setting.get("alpha", 0)) + float(rng.normal(0, 0.005)), 3),
                steps=steps,
                minute=number,
                base=base,
            )


def _line(step: int, accuracy: float) -> dict[str, float]:
    return {
        "step": step,
        "reward": accuracy * (1 - 0.9**step),
        "loss": 1.0 / step,
        "monitor/entropy": 0.5 / step,
        "monitor/length_tokens": 5.0 + step / 10,
        "time/generate_s": 0.3,
        "time/reward_s": 0.01,
        "time/teacher_s": 0.2,
        "time/update_s": 0.5,
        "tokens/generated": 160 * step,
        "time/total_s": 1.2 * step,
        **{f"other/{number}": step * 0.1234567 for number in range(25)},
    }


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inner = nested
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return nested
