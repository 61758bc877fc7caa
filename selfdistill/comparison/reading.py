"""Runs' folders, read into data frames: one row a run, one row a logged step, one row an evaluated item."""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import orjson
import pandas as pd
import yaml

from selfdistill.config.overrides import key_and_value
from selfdistill.errors import UserError, first_line

try:
    from yaml import CSafeLoader as YamlLoader
except ImportError:  # PyYAML without libyaml: the same values, fifteen times slower
    from yaml import SafeLoader as YamlLoader  # type: ignore[assignment]

QUOTED = 200  # characters of a message that are kept
# Statuses of runs that reached their end, whose results may be averaged.
COMPLETE = "finished"


@dataclass(frozen=True)
class RunSet:
    """Runs that were found, as data frames. The index of `runs` and `configs` is the run's folder.

    Attributes:
        runs: one row a run: `run_id`, `status`, `reason` (why it is not finished), `seed`, `group`, `started`,
            `wall_s`, `peak_memory_gib`, `alarms`, `best_step` (whose weights `keep_best` kept), and its
            last evaluation under the metrics' own names (`eval/accuracy`), that of the start under `before/…`.
        configs: one row a run and one column for each key of the configuration, nested ones with dots; the groups that
            were chosen on the command line (`experiment`) stand beside them.
        chosen: the keys that were written on a run's command line, in the order of their first use.
        curves: one row a logged step: `run`, `step` and the metrics.
        provenance: of each folder, what it says of versions, commit, command, machine and data.
    """

    runs: pd.DataFrame
    configs: pd.DataFrame
    chosen: list[str]
    curves: pd.DataFrame
    provenance: dict[str, dict[str, Any]]
    _verdicts: dict[tuple[str, int | None], "pd.Series[bool]"] = field(default_factory=dict, repr=False)

    @cached_property
    def items(self) -> pd.DataFrame:
        """One row an evaluated item: `run`, `step`, `suite`, `row`, `prompt`, `answer`, `verdict`; read when asked for.

        Empty for runs without an evaluation.jsonl.
        """
        lines = [{"run": run, **line} for run in self.runs.index for line in _lines(Path(run) / "evaluation.jsonl")]
        columns = ["run", "step", "suite", "row", "prompt", "answer", "verdict"]
        return pd.DataFrame(lines) if lines else pd.DataFrame(columns=columns)

    def verdicts(self, run: str, step: int | None = None) -> "pd.Series[bool]":
        """Whether the task's items were answered rightly, by row and prompt; empty where it is not known.

        Rows have numbers, which other data have as well, so that only the prompt beside it says which item one is.
        Items with partial credit (a verdict between 0 and 1) are no yes or no, so they make it empty.

        Args:
            step: the evaluation after this one; when None that of the run's model, which is the last one, or with
                `keep_best` the best one.
        """
        if (run, step) in self._verdicts:
            return self._verdicts[run, step]
        lines = [line for line in _lines(Path(run) / "evaluation.jsonl") if line.get("suite") in (None, "task")]
        best = self.runs["best_step"].get(run) if "best_step" in self.runs and step is None else step
        last = max((line["step"] for line in lines), default=None) if pd.isna(best) else best
        lines = [line for line in lines if line["step"] == last]
        found = {(str(line.get("row")), line.get("prompt")): line.get("verdict") for line in lines}
        known = {item: float(verdict) for item, verdict in found.items() if isinstance(verdict, bool | int | float)}
        if not set(known.values()) <= {0.0, 1.0}:
            known = {}
        self._verdicts[run, step] = pd.Series({item: verdict == 1.0 for item, verdict in known.items()}, dtype=bool)
        return self._verdicts[run, step]


def load_runs(*paths: str | Path) -> RunSet:
    """Read the runs in these folders and below them.

    Args:
        paths: runs' folders, folders of sweeps, or globs.

    Raises:
        UserError: a path that is not there, or none of them holds a run.
    """
    places = list(dict.fromkeys(place for path in paths for place in _expanded(path)))
    folders = list(dict.fromkeys(folder for place in places for folder in _run_folders(place)))
    jobs = [job for place in places for job in _jobs_without_a_folder(place, {folder.name for folder in folders})]
    if not folders and not jobs:
        raise UserError(f"no run's folder in {', '.join(map(str, paths))[:QUOTED]}: one holds config.yaml.")
    runs, configs, curves, provenance = {}, {}, [], {}
    chosen: dict[str, None] = {}
    for folder in folders:
        run, config, overrides, provenance[str(folder)] = _read(folder)
        lines = _lines(folder / "metrics.jsonl")
        run["logged_steps"] = max((line["step"] for line in lines), default=0)
        runs[str(folder)], configs[str(folder)] = run | _why(run, config, folder), config | overrides
        chosen |= dict.fromkeys(overrides)
        curves += [{"run": str(folder), **line} for line in lines]
    for name, run, overrides in jobs:
        runs[name], configs[name], provenance[name] = run, overrides, {}
        chosen |= dict.fromkeys(overrides)
    logged = pd.DataFrame.from_records(curves) if curves else pd.DataFrame(columns=["run", "step"])
    frame = pd.DataFrame.from_dict(runs, orient="index")
    order = frame.sort_values("started", kind="stable").index if "started" in frame else frame.index
    return RunSet(
        frame.loc[order],
        pd.DataFrame.from_dict(configs, orient="index", dtype=object).loc[order],
        list(chosen),
        logged.astype({"run": "category"}),
        provenance,
    )


def _expanded(path: str | Path) -> list[Path]:
    if Path(path).exists():
        return [Path(path).absolute()]
    found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise UserError(f"{str(path)[:QUOTED]}: there is no such folder.")
    return [Path(name).absolute() for name in found if Path(name).is_dir()]


def _run_folders(place: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(place):
        if "config.yaml" in files and {"summary.json", "metrics.jsonl"} & set(files):
            folders.clear()
            yield Path(name)
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))


def _jobs_without_a_folder(place: Path, known: set[str]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Jobs of a sweep that left no folder, because they were refused or died before they had one."""
    for file in sorted(place.rglob("jobs.jsonl")) if place.is_dir() else []:
        latest = {line["job"]: line for line in _lines(file, key="job")}
        for number, line in latest.items():
            if line.get("run") and Path(line["run"]).name in known:
                continue
            overrides = _overrides(line.get("overrides") or [])
            yield (
                f"{file.parent}#{number}",
                {
                    "run_id": f"job {number}",
                    "status": line.get("status") or "unknown",
                    "reason": str(line.get("message") or "no folder was left")[:QUOTED],
                    "seed": _plain(overrides.get("seed")),
                    "started": None,
                    "group": None,
                    "alarms": [],
                },
                overrides,
            )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A row of `runs`, the flat configuration, the command line's keys, and the provenance of one run."""
    reason = None
    try:
        summary = _part(folder / "summary.json", orjson.loads)
        config = _part(folder / "config.yaml", _flat_config)
        provenance = _part(folder / "provenance.json", orjson.loads, optional=True)
        written = _part(folder / ".hydra" / "overrides.yaml", _yaml, list, optional=True)
    except ValueError as error:
        reason = str(error)
        summary, config, provenance, written = {}, {}, {}, []
    evaluations = summary.get("eval") or {}
    run = {
        "run_id": summary.get("run_id", folder.name),
        "status": "unreadable" if reason else summary.get("status", "unknown"),
        "reason": reason,
        "seed": config.get("seed"),
        "group": config.get("group"),
        "started": None if reason else summary.get("started", ""),
        "wall_s": summary.get("wall_s"),
        "peak_memory_gib": max((summary.get("peak_memory_gib") or {}).values(), default=None),
        "alarms": summary.get("alarms") or [],
        "best_step": (summary.get("best") or {}).get("step"),
        **{f"before/{name}": value for name, value in (evaluations.get("before") or {}).items()},
        **(evaluations.get("after") or {}),
    }
    # What the summary says is shorter: the packages that matter, one commit.
    provenance |= {key: summary[key] for key in ("command", "git", "versions", "host", "folder") if summary.get(key)}
    overrides = _overrides(written)
    return run, config, {key: config.get(key, value) for key, value in overrides.items()}, provenance


def _part(file: Path, parse: Callable[[str], Any], kind: type = dict, *, optional: bool = False) -> Any:
    """What one of a run's files says, empty for an optional one that is not there.

    Raises:
        ValueError: it is not there or damaged; the message names it.
    """
    if optional and not file.is_file():
        return kind()
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        raise ValueError(f"{file.name} cannot be read: {said or first_line(error)}"[:QUOTED]) from error
    if not isinstance(content, kind):
        raise ValueError(f"{file.name} cannot be read: it holds no {'list' if kind is list else 'mapping'}")
    return content


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=YamlLoader) or []


def _why(run: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Why a run is not finished, as the last thing that it wrote says."""
    status, steps = run["status"], f"at step {run['logged_steps']} of {config.get('max_steps')}"
    if status == COMPLETE or run["reason"]:
        return {}
    if status == "stopped":
        stops = [alarm for alarm in run["alarms"] if alarm.get("action") == "stop"]
        return {"reason": f"{steps}: {stops[-1]['message'] if stops else 'by a monitor'}"[:QUOTED]}
    if status == "failed" and (folder / "error.txt").is_file():
        lines = (folder / "error.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"reason": f"{steps}: {lines[-1] if lines else ''}"[:QUOTED]}
    return {"reason": f"{steps}, or killed there" if status == "running" else steps}


def _overrides(written: Iterable[str]) -> dict[str, Any]:
    """Keys and values of a command line, without Hydra's own and the marks for adding and removing."""
    pairs = (key_and_value(str(override)) for override in written)
    return {key.partition("@")[0]: value for key, value in pairs if not key.startswith("hydra")}


def _plain(value: Any) -> Any:
    return yaml.load(value, Loader=YamlLoader) if isinstance(value, str) else value


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined with dots; an empty mapping keeps its key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _flat_config(text: str) -> dict[str, Any]:
    """A configuration with dotted keys. Most of its top-level keys are those of the run before, and read once."""
    if "&" in text:  # an anchor may be used by another key
        return _flat(yaml.load(text, Loader=YamlLoader))
    blocks = re.split(r"^(?=[^\s#-])", text, flags=re.MULTILINE)
    return {key: value for block in blocks for key, value in _flat_block(block).items()}


@lru_cache(maxsize=4096)
def _flat_block(text: str) -> dict[str, Any]:
    return _flat(yaml.load(text, Loader=YamlLoader) or {})


def _lines(file: Path, key: str = "step") -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; what a kill left of a line is passed over."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_bytes().splitlines():
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(record, dict) and record.get(key) is not None:
            found.append(record)
    return found
