"""What every logger does, and the one that does nothing."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from omegaconf import DictConfig

from selfdistill.config.secrets import Redactor
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.step_log import jsonable


@runtime_checkable
class RunLogger(Protocol):
    """Shows a run. The order of calls is start, then log, table and summary, then finish, in every case."""

    def start(self, run: RunFolder, config: DictConfig) -> None:
        """Begin, or continue the run of the same id; the configuration is recorded flat, its secrets masked."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics of a step; values that are not finite numbers are left out."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table, at the step that was logged last."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values."""

    def finish(self, failed: bool = False) -> None:
        """Write out what is left; never raises, may be called twice or without start."""

    @property
    def location(self) -> str | None:
        """Where to look, or the command that shows it; None if there is nothing to see."""


class NoLogger:
    """Leaves the record to the run's folder."""

    location: str | None = None

    def start(self, run: RunFolder, config: DictConfig) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def summary(self, values: Mapping[str, Any]) -> None:
        pass

    def finish(self, failed: bool = False) -> None:
        pass


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined with dots; lists stay values, an empty mapping is left out."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result.update(flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return result


def flat_config(config: DictConfig) -> dict[str, Any]:
    """The configuration, resolved and flat, secrets masked."""
    return jsonable(flat(Redactor(config).config))


def finite(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    """The metrics that are finite numbers, as plain ones."""
    plain = {name: jsonable(value) for name, value in metrics.items()}
    return {name: value for name, value in plain.items() if isinstance(value, int | float) and math.isfinite(value)}


def columns_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Column names, in the order in which they appear, and the plain values of each row, None where there is none."""
    records = [flat(jsonable(row)) for row in rows]
    columns = list(dict.fromkeys(name for record in records for name in record))
    return columns, [[record.get(name) for name in columns] for record in records]


def multirun_group() -> str | None:
    """One name for all jobs of a Hydra multirun, from its folder; None outside of a multirun."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return "-".join(Path(HydraConfig.get().sweep.dir).parts[-2:])
