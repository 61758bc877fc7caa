"""The table of a sweep's jobs: while they run, with step, reward and time left, and at the end."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.live import Live
from rich.table import Table
from rich.text import Text

from selfdistill.runs.screen import Screen
from selfdistill.runs.sweep_folder import Job
from selfdistill.text import clock, short

# What of metrics.jsonl is read for a job that runs.
TAIL_BYTES = 65_536
MESSAGE_LINES, MESSAGE_CHARACTERS = 3, 400
# The metric that says how much of a limit is spent.
LIMITS = {"max_steps": "step", "budget_s": "time/training_s", "budget_tokens": "tokens/generated"}


@dataclass(frozen=True)
class Progress:
    """How far a run is: its step and its limit, the reward, and the seconds that are left, as far as they are known."""

    step: int = 0
    of_steps: int | None = None
    reward: float | None = None
    left_s: float | None = None


def progress_of(run: str | Path) -> Progress:
    """From the last lines of its metrics."""
    try:
        limits = _limits(Path(run))
        with (Path(run) / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = [line for line in map(_parsed, file.read().splitlines()) if line and line.get("step")]
    except OSError:
        return Progress()
    if not lines:
        return Progress(of_steps=limits.get("max_steps"))
    first, last = lines[0], lines[-1]
    rewards = [line["reward"] for line in lines if line.get("reward") is not None]
    seconds = (last.get("time/total_s") or 0) - (first.get("time/total_s") or 0)
    left = []
    for name, limit in limits.items():
        spent, before = last.get(LIMITS[name]), first.get(LIMITS[name])
        if spent is not None and before is not None and spent > before:
            left.append(max(0.0, (limit - spent) * seconds / (spent - before)))
    steps = limits.get("max_steps")
    return Progress(last["step"], steps, rewards[-1] if rewards else None, min(left, default=None))


def _limits(run: Path) -> dict[str, Any]:
    config = OmegaConf.load(run / "config.yaml")
    limits = {name: OmegaConf.select(config, name) for name in LIMITS}
    if OmegaConf.select(config, "epochs") is not None:
        del limits["max_steps"]  # epochs decide in its place
    if tasks := len(OmegaConf.select(config, "tasks") or {}):
        limits = {name: limit and limit * tasks for name, limit in limits.items()}  # of each stage of a sequence
    return {name: limit for name, limit in limits.items() if limit is not None}


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # half of a line
        return None
    return record if isinstance(record, dict) else None


def told(jobs: Iterable[Job]) -> dict[int, str]:
    """What tells the jobs apart: their overrides without those that all of them have, by number."""
    jobs = list(jobs)
    same = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    return {job.number: " ".join(o for o in job.overrides if o not in same) for job in jobs}


def table_of(jobs: Iterable[Job], title: str, *, height: int | None = None) -> Table:
    """A row for each job.

    Args:
        height: rows at most; those that run stand first where there are too many.
    """
    jobs = list(jobs)
    names = told(jobs)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    if height is not None and len(jobs) > height:
        order = ("running", "failed", "killed", "refused")
        jobs = sorted(jobs, key=lambda job: order.index(job.status) if job.status in order else len(order))[:height]
        jobs = sorted(jobs, key=lambda job: job.number)
        table.caption = f"and {len(names) - height} more"
    rows = []
    for job in jobs:
        progress = progress_of(job.run) if job.run is not None else Progress()
        step = f"{progress.step}/{progress.of_steps}" if progress.of_steps else str(progress.step)
        left = clock(progress.left_s) if job.status == "running" and progress.left_s is not None else ""
        row = (
            str(job.number),
            Text(names[job.number]),
            job.status,
            step if job.run is not None else "",
            short(progress.reward) or "",
            short(job.objective) or "",
            left,
            Text(_first_lines(job.message) if job.message else Path(job.run).name if job.run else ""),
        )
        rows.append(row)
    columns = ("job", "overrides", "status", "step", "reward", "objective", "left", "run, or why not")
    filled = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    for index in filled:
        table.add_column(columns[index], overflow="fold")
    for row in rows:
        table.add_row(*(row[index] for index in filled))
    return table


def _first_lines(message: str) -> str:
    return "\n".join(message.strip().splitlines()[:MESSAGE_LINES])[:MESSAGE_CHARACTERS]


class LiveTable:
    """Shows the jobs while they run: a table that is renewed on a terminal, a line for each change in a pipe."""

    def __init__(self, title: str, screen: Screen | None = None) -> None:
        self.title, self.screen = title, screen or Screen()
        # Without a thread of its own: this process forks.
        self._live = Live(console=self.screen, auto_refresh=False, transient=True) if self.screen.is_terminal else None
        self._said: dict[int, str] = {}

    def __enter__(self) -> "LiveTable":  # noqa: PYI034 - beartype, which checks types in the tests, refuses Self here
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, jobs: Iterable[Job]) -> None:
        """The jobs as they are now."""
        jobs = list(jobs)
        if self._live is not None:
            self._live.update(table_of(jobs, self.title, height=max(4, self.screen.height - 6)), refresh=True)
            return
        names = told(jobs)
        for job in jobs:
            if job.status != self._said.get(job.number, "waiting"):
                why = f": {_first_lines(job.message)}" if job.message else f" ({Path(job.run).name})" if job.run else ""
                self.screen.print_line(f"job {job.number} {job.status}  {names[job.number]}{why}")
            self._said[job.number] = job.status
