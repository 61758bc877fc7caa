"""Trackio: a local dashboard without an account."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from selfdistill.errors import UserError
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.loggers.base import LibraryLogger, flat, flat_config


@dataclass(eq=False)
class TrackioLogger(LibraryLogger):
    """Logs to Trackio's local database (TRACKIO_DIR); `trackio show` opens the dashboard.

    Args:
        project: Trackio project.
        group: group of runs; None: no group.
        name: shown name; None is the run's id.

    Raises:
        UserError: trackio is not installed.
    """

    project: str = "selfdistill"
    group: str | None = None
    name: str | None = None

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

    def summary(self, values: Mapping[str, Any]) -> None:
        # Trackio has no summary: the values stand at the last step.
        self.log(self._step, {f"summary/{name}": value for name, value in flat(values).items()})

    def _table(self, columns: list[str], data: list[list[Any]]) -> Any:
        import pandas
        import trackio

        return trackio.Table(dataframe=pandas.DataFrame(data, columns=columns))
