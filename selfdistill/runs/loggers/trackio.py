"""Trackio: a local dashboard without an account."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from selfdistill.errors import UserError
from selfdistill.runs.console import flat
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.labels import labels_of
from selfdistill.runs.loggers.base import LibraryLogger, flat_config


@dataclass(eq=False)
class TrackioLogger(LibraryLogger):
    """Logs to Trackio's local database (TRACKIO_DIR); `trackio show` opens the dashboard.

    Args:
        project: Trackio project.
        group: group of runs; None: no group.
        name: shown name; None is the run's id, and for a job of a sweep its method with the values that were swept and
            the end of its id, because Trackio tells runs apart by their names.
        tags: entered into the configuration, beside the options that were chosen; Trackio has no tags of its own.

    Raises:
        UserError: trackio is not installed.
    """

    project: str = "selfdistill"
    group: str | None = None
    name: str | None = None
    tags: Sequence[str] = ()

    @property
    def location(self) -> str | None:
        return None if self._run is None else f"trackio show --project {self.project}"

    def start(self, run: RunFolder, config: DictConfig) -> None:
        try:
            import trackio
        except ImportError as error:
            raise UserError("logger=trackio needs the package trackio: pip install trackio.") from error
        from trackio.sqlite_storage import SQLiteStorage

        labels = labels_of(run.path)
        name = self.name or (f"{labels.name(run)} {run.run_id[-4:]}" if labels.swept else run.run_id)
        logged = SQLiteStorage.get_logs(self.project, name)
        self._before = frozenset(row["step"] for row in logged if row.get("step") is not None)
        with redirect_stdout(io.StringIO()):  # it says what the run says at its end
            self._run = trackio.init(
                project=self.project,
                name=name,
                group=self.group,
                config=flat_config(config) | labels.fields | {"tags": [*self.tags, *labels.tags]},
                resume="allow",
                embed=False,
            )

    def files(self, kind: str, paths: Sequence[Path]) -> None:
        import trackio

        artifact = trackio.Artifact(f"{kind}-{self.active.id}", type=kind)
        for path in paths:
            artifact.add_file(path)
        self.active.log_artifact(artifact)

    def summary(self, values: Mapping[str, Any]) -> None:
        # Trackio has no summary: the numbers and words stand at the last step.
        self.active.log({f"summary/{name}": value for name, value in flat(values, joined_by="/").items()}, self._step)

    def _finish(self, failed: bool) -> None:
        import trackio

        is_current = trackio.context_vars.current_run.get() is self._run
        with redirect_stdout(io.StringIO()):
            (trackio.finish if is_current else self._run.finish)()  # the former is not called again at exit

    def _table(self, columns: list[str], data: list[list[Any]]) -> Any:
        import pandas
        import trackio

        return trackio.Table(dataframe=pandas.DataFrame(data, columns=columns))
