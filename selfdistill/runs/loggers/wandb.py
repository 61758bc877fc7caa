"""Weights & Biases."""

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from selfdistill.errors import UserError
from selfdistill.runs.console import flat
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.labels import Labels, labels_of
from selfdistill.runs.loggers import wandb_file
from selfdistill.runs.loggers.base import BEST, X_AXES, LibraryLogger, flat_config
from selfdistill.runs.screen import LOG

Mode = Literal["online", "offline", "disabled"]


@dataclass(eq=False)
class WandbLogger(LibraryLogger):
    """Logs to W&B: online where an API key is set, otherwise to a file in the run's folder that `wandb sync` uploads.

    It never asks for anything. A run goes offline where the server cannot be reached or refuses the key. A resumed run
    continues the W&B run of the same id: its steps are sent once, those before a kill included.

    Args:
        project: W&B project.
        entity: user or team; None is the key's default.
        group: group of runs; None: no group.
        name: shown name; None is the run's id, and for a job of a sweep its method with the values that were swept.
        tags: tags of the run, beside the options that were chosen.
        mode: online, offline, disabled; None decides by itself and listens to WANDB_MODE.
        init_timeout_s: how long to wait for the server at the start, for the login and the run together.
        finish_timeout_s: how long to wait for uploads at the end; the file stays in any case.
        flush_every_s: seconds after which what was logged is in the file, even if the process is killed then.

    Raises:
        UserError: an unknown mode, or mode online without an API key.
    """

    _folder = Path()

    project: str = "selfdistill"
    group: str | None = None
    name: str | None = None
    tags: Sequence[str] = ()
    mode: str | None = None
    entity: str | None = None
    init_timeout_s: float = 30.0
    finish_timeout_s: float = 300.0
    flush_every_s: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in (None, "online", "offline", "disabled"):
            raise UserError(f"logger.mode is {self.mode!r}; write online, offline, disabled or null.")

    @property
    def location(self) -> str | None:
        if self._run is None or self._run.disabled:
            return None
        if self._run.offline:
            # One folder for each time the run was started or resumed; the pattern takes them all.
            return f"wandb sync {os.path.relpath(self._folder)}/wandb/offline-run-*"
        return self._run.url

    def start(self, run: RunFolder, config: DictConfig) -> None:
        import wandb

        self._folder = run.path
        self._before = wandb_file.steps(run.path / "wandb")
        deadline = time.monotonic() + self.init_timeout_s
        mode = self._mode()
        labels = labels_of(run.path)
        try:
            self._run = self._init(run, config, labels, mode, max(1.0, deadline - time.monotonic()))
        except wandb.Error as error:
            if mode != "online":
                raise
            _warn_offline(error)
            # The failed start keeps the run's id in use until W&B's own process has ended.
            within(self.finish_timeout_s, wandb.teardown)
            self._run = self._init(run, config, labels, "offline", self.init_timeout_s)
        if self._run.starting_step:  # the server knows the run: it takes no step a second time, and no earlier one
            self._before |= frozenset(range(self._run.starting_step))
        self._define_metrics()
        self._show_log(run.path / LOG)

    def files(self, kind: str, paths: Sequence[Path]) -> None:
        import wandb

        if self.active.disabled:
            return
        artifact = wandb.Artifact(f"{kind}-{self.active.id}", type=kind)
        for path in paths:
            artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
        self.active.log_artifact(artifact)

    def summary(self, values: Mapping[str, Any]) -> None:
        self.active.summary.update(flat(values, joined_by="/"))

    def _row(self, step: int, metrics: dict[str, int | float]) -> dict[str, int | float]:
        return metrics | {X_AXES[0]: step}  # W&B's own step may be another one where a run is logged from Python

    def _table(self, columns: list[str], data: list[list[Any]]) -> Any:
        import wandb

        return wandb.Table(columns=[*columns], data=data)

    def _finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _mode(self) -> Mode:
        import wandb

        mode = self.mode or os.environ.get("WANDB_MODE", "").lower()
        if mode in ("disabled", "offline", "dryrun"):
            return "disabled" if mode == "disabled" else "offline"
        try:
            if within(self.init_timeout_s, lambda: wandb.login(prompt=False, verify=True)):
                return "online"
        except (wandb.Error, TimeoutError) as error:
            _warn_offline(error)
            return "offline"
        if self.mode == "online":
            raise UserError(
                "logger.mode is online, but no W&B API key is set. Run `wandb login`, set WANDB_API_KEY, "
                "or leave logger.mode at null to log offline."
            )
        return "offline"

    def _init(self, run: RunFolder, config: DictConfig, labels: Labels, mode: Mode, timeout_s: float) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",  # the logs are the run's log.txt, which has no progress bar in it
            init_timeout=timeout_s,
            finish_timeout=self.finish_timeout_s,
            x_disable_meta=run.hides(sys.argv),  # the metadata would hold the command line as it is
            x_transaction_log_flush_interval=self.flush_every_s,
        )
        return wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=self.name or labels.name(run),
            tags=[*self.tags, *labels.tags] or None,
            job_type=labels.method,
            id=run.run_id,
            resume="allow",
            reinit="create_new",  # another run of this process is left alone
            mode=mode,
            dir=str(run.path),
            config=flat_config(config) | labels.fields,
            settings=settings,
        )

    def _define_metrics(self) -> None:
        for axis in X_AXES:
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric=X_AXES[0])
        for name, best in BEST.items():
            self._run.define_metric(name, step_metric=X_AXES[0], summary=f"{best},last")

    def _show_log(self, log: Path) -> None:
        """Makes the run's log what W&B shows as logs: `output.log` among the run's files, sent as it grows."""
        if self._run.disabled or not log.is_file():
            return
        link = Path(self._run.dir) / "output.log"
        with suppress(OSError):
            link.symlink_to(log.absolute())
            self._run.save(str(link), base_path=self._run.dir, policy="live")


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What the call returns, if it does so in time; one that does not is left behind in its thread.

    Raises:
        TimeoutError: it took longer.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((call(), None))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            outcome.extend((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = outcome
    if error is not None:
        raise error
    return value


def _warn_offline(error: Exception) -> None:
    warnings.warn(f"W&B cannot be used online, so the run is logged offline: {error}", stacklevel=3)
