"""Trackio: a local dashboard without an account."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from selfdistill.errors import UserError
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.loggers.base import columns_of, finite, flat, flat_config


class TrackioLogger:
    """Logs to Trackio's local database (TRACKIO_DIR); `trackio show` opens the dashboard.

    Args:
        project: Trackio project.
        group: group of runs; None: no group.
        name: shown name; None is the run's id.

    Raises:
        UserError: trackio is not installed.
    """

    def __init__(self, project: str = "selfdistill", group: str | None = None, name: str | None = None) -> None:
        self.project, self.group, self.name = project, group, name
        self._run: Any = None
        self._step = 0

    @property
    def location(self) -> str | None:
        return None if self._run is None else f"trackio show --project {self.project}"

    def start(self, run: RunFolder, config: DictConfig) -> None:
        try:
            import trackio
        except ImportError as error:
            raise UserError("logger=trackio needs the package trackio: pip install trackio.") from error
        self._run = trackio.init(
            project=self.project,
            name=self.name or run.run_id,
            group=self.group,
            config=flat_config(config),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._step = step
        self._active().log(finite(metrics), step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import pandas
        import trackio

        columns, data = columns_of(rows)
        frame = pandas.DataFrame(data, columns=columns)
        self._active().log({name: trackio.Table(dataframe=frame)}, step=self._step)

    def summary(self, values: Mapping[str, Any]) -> None:
        # Trackio has no summary: the values stand at the last step.
        numbers = finite(flat(values))
        self._active().log({f"summary/{name}": value for name, value in numbers.items()}, step=self._step)

    def finish(self, failed: bool = False) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:  # noqa: BLE001 - the end of a run must not fail here
            warnings.warn(f"Trackio did not finish cleanly: {error}", stacklevel=2)

    def _active(self) -> Any:
        if self._run is None:
            raise ValueError("The logger was not started.")
        return self._run
