"""The same data frames as from folders, of runs that were recorded in W&B."""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from selfdistill.comparison.reading import COMPLETE, QUOTED, RunSet
from selfdistill.errors import UserError

# What W&B calls a run that wrote no status of its own.
STATES = {"finished": COMPLETE, "crashed": "killed", "killed": "killed"}
SWEPT = re.compile(r"(?<!\S)([\w./@]+)=(\S+)")
SIDES = {"after/": "eval/", "before/": "before/eval/"}


def load_wandb(path: str, *, group: str | None = None, api: Any = None) -> RunSet:
    """Read the runs of a W&B project, or of one of its groups.

    Evaluated items and provenance stay with W&B's artifacts, so that accuracies carry no Wilson intervals and McNemar's
    test is left out.

    Args:
        path: ENTITY/PROJECT.
        group: a sweep's group; None takes all runs of the project.
        api: a `wandb.Api`; None makes one.

    Returns:
        What `load_runs` returns of folders; a run's index is ENTITY/PROJECT/ID.

    Raises:
        UserError: W&B cannot be asked, or has no such run.
    """
    import wandb

    try:
        api = wandb.Api() if api is None else api
        found = list(api.runs(path, filters={"group": group} if group else {}))
        rows = {"/".join(run.path): (_row(run), _config(run), _curve(run)) for run in found}
    except (wandb.Error, ValueError) as error:  # a ValueError where the project is not there
        raise UserError(f"{path[:QUOTED]} cannot be read from W&B: {str(error)[:QUOTED]}") from None
    if not rows:
        raise UserError(f"W&B has no runs of {path[:QUOTED]}" + (f" in the group {group[:QUOTED]}." if group else "."))
    runs = pd.DataFrame.from_dict({name: row for name, (row, _, _) in rows.items()}, orient="index")
    configs = pd.DataFrame.from_dict(
        {name: config for name, (_, config, _) in rows.items()}, orient="index", dtype=object
    )
    curves = pd.DataFrame.from_records([{"run": name, **line} for name, (*_, lines) in rows.items() for line in lines])
    curves = curves if len(curves) else pd.DataFrame(columns=["run", "step"])
    order = runs.sort_values("started", kind="stable").index
    swept = dict.fromkeys(key for run in found for key, _ in SWEPT.findall(run.name or ""))
    return RunSet(
        runs.loc[order], configs.loc[order], list(swept), curves.astype({"run": "category"}), {n: {} for n in rows}
    )


def _row(run: Any) -> dict[str, Any]:
    """One row of `RunSet.runs`."""
    summary: Mapping[str, Any] = dict(run.summary)
    status = summary.get("status") or STATES.get(run.state, run.state)
    memory = [value for name, value in summary.items() if name.startswith("peak_memory_gib/")]
    evaluated = {
        f"{ours}{name.removeprefix(theirs)}": value
        for theirs, ours in SIDES.items()
        for name, value in summary.items()
        if name.startswith(theirs)
    }
    return {
        "run_id": run.id,
        "status": status,
        "reason": None if status == COMPLETE else f"{run.state} in W&B at step {summary.get('step')}",
        "seed": run.config.get("seed"),
        "group": run.group,
        "started": run.created_at,
        "wall_s": summary.get("wall_s"),
        "peak_memory_gib": max(memory, default=None),
        "alarms": [],
        "logged_steps": summary.get("step") or 0,
        **evaluated,
    }


def _config(run: Any) -> dict[str, Any]:
    """The flat configuration, with the values that the run's sweep varied."""
    return {**run.config, **{key: run.config.get(key, value) for key, value in SWEPT.findall(run.name or "")}}


def _curve(run: Any) -> list[dict[str, Any]]:
    """The numbers of each logged step; tables and W&B's own columns are left out."""
    lines = (
        {k: v for k, v in line.items() if isinstance(v, int | float) and not k.startswith("_")}
        for line in run.scan_history()
    )
    return [line for line in lines if "step" in line]
