"""What every logger does."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from selfdistill.config.secrets import Redactor
from selfdistill.goals import is_more_better
from selfdistill.runs.console import flat
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.step_log import jsonable

# What curves can be drawn over; the first is the axis that is shown unless another one is chosen.
X_AXES = ("step", "tokens/generated", "time/total_s")
# Of these metrics the summary has the best value beside the last one.
BEST = {
    name: "max" if is_more_better(name) else "min"
    for name in ("eval/accuracy", "eval/retention", "eval/forgetting", "reward", "distill/divergence")
}


class RunLogger:
    """Shows a run. The order of calls is start, catch_up, log, table, files and summary, then finish, in every case."""

    @property
    def location(self) -> str | None:
        """Where to look, or the command that shows it; None if there is nothing to see."""
        return None

    def start(self, run: RunFolder, config: DictConfig) -> None:
        """Begin, or continue the run of the same id; the configuration is recorded flat, its secrets masked."""

    def catch_up(self, metrics: Sequence[Mapping[str, Any]], completions: Sequence[Mapping[str, Any]]) -> None:
        """Lines of metrics.jsonl and completions.jsonl, each with its step: what was not handed over yet is sent."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics of a step; values that are not finite numbers are left out."""

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table, at the step that was logged last; it gets a column `step`."""

    def files(self, kind: str, paths: Sequence[Path]) -> None:
        """Files of the run, such as its configuration or its report, under one name."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values."""

    def finish(self, failed: bool = False) -> None:
        """Write out what is left; never raises, may be called twice or without start."""


class NoLogger(RunLogger):
    """Leaves the record to the run's folder."""


class LibraryLogger(RunLogger):
    """A logger on a library that has an object for a run, with a method `log`; `start` puts it in place.

    Steps that an earlier process of a resumed run has handed over already are not logged again.
    """

    _run: Any = None
    _step = -1
    _before: frozenset[int] = frozenset()

    @property
    def active(self) -> Any:
        """The library's object for this run."""
        if self._run is None:
            raise ValueError("The logger was not started.")
        return self._run

    def catch_up(self, metrics: Sequence[Mapping[str, Any]], completions: Sequence[Mapping[str, Any]]) -> None:
        for line in metrics:
            step = line["step"]
            if step <= self._step or step in self._before:
                continue
            self.log(step, {name: value for name, value in line.items() if name != "step"})
            rows = [row for row in completions if row["step"] == step]
            if rows:
                self.table("completions", step, rows)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._step = step
        if step not in self._before:
            self.active.log(self._row(step, finite(metrics)), step=step)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        if step not in self._before:
            table = self._table(*columns_of([{"step": step, **row} for row in rows]))
            self.active.log({name: table}, step=step)

    def finish(self, failed: bool = False) -> None:
        if self._run is None:
            return
        try:
            self._finish(failed)
        except Exception as error:  # noqa: BLE001 - the end of a run must not fail here
            warnings.warn(f"{type(self).__name__} did not finish cleanly: {error}", stacklevel=2)

    def _row(self, step: int, metrics: dict[str, int | float]) -> dict[str, int | float]:
        """What the library is given of a step."""
        return metrics

    def _table(self, columns: list[str], data: list[list[Any]]) -> Any:
        """The library's object for a table."""
        raise NotImplementedError

    def _finish(self, failed: bool) -> None:
        self._run.finish()


def flat_config(config: DictConfig) -> dict[str, Any]:
    """The configuration, resolved and flat, secrets masked."""
    return jsonable(flat(Redactor(config).config))


def finite(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    """The metrics that are finite numbers, as plain ones."""
    return {name: value for name, value in jsonable(metrics).items() if isinstance(value, int | float)}


def columns_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Column names, in the order in which they appear, and the plain values of each row, None where there is none."""
    records = [flat(jsonable(row)) for row in rows]
    columns = list(dict.fromkeys(name for record in records for name in record))
    return columns, [[record.get(name) for name in columns] for record in records]
