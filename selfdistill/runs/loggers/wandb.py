"""Weights & Biases."""

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from selfdistill.errors import UserError
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.loggers.base import LibraryLogger, flat, flat_config


@dataclass(eq=False)
class WandbLogger(LibraryLogger):
    """Logs to W&B: online where an API key is set, otherwise to a file in the run's folder that `wandb sync` uploads.

    It never asks for anything. A run goes offline where the server cannot be reached or refuses the key. A resumed run
    continues the W&B run of the same id; the server ignores the steps that it repeats after a kill.

    Args:
        project: W&B project.
        entity: user or team; None is the key's default.
        group: group of runs; None: no group.
        name: shown name; None is the run's id.
        tags: tags of the run.
        mode: online, offline, disabled; None decides by itself and listens to WANDB_MODE.
        init_timeout_s: how long to wait for the server at the start.
        finish_timeout_s: how long to wait for uploads at the end; the file stays in any case.

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
        mode = self._mode()
        try:
            self._run = self._init(run, config, mode)
        except wandb.Error as error:
            if mode != "online":
                raise
            _warn_offline(error)
            # The failed start keeps the run's id in use until W&B's own process has ended.
            wandb.teardown()
            self._run = self._init(run, config, "offline")

    def summary(self, values: Mapping[str, Any]) -> None:
        self.active.summary.update(flat(values))

    def _table(self, columns: list[str], data: list[list[Any]]) -> Any:
        import wandb

        return wandb.Table(columns=[*columns], data=data)

    def _finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _mode(self) -> Literal["online", "offline", "disabled"]:
        import wandb

        mode = self.mode or os.environ.get("WANDB_MODE", "").lower()
        if mode in ("disabled", "offline", "dryrun"):
            return "disabled" if mode == "disabled" else "offline"
        try:
            if wandb.login(prompt=False, verify=True):
                return "online"
        except wandb.Error as error:
            _warn_offline(error)
            return "offline"
        if self.mode == "online":
            raise UserError(
                "logger.mode is online, but no W&B API key is set. Run `wandb login`, set WANDB_API_KEY, "
                "or leave logger.mode at null to log offline."
            )
        return "offline"

    def _init(self, run: RunFolder, config: DictConfig, mode: Literal["online", "offline", "disabled"]) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self.init_timeout_s,
            finish_timeout=self.finish_timeout_s,
            x_disable_meta=run.hides(sys.argv),  # the metadata would hold the command line as it is
        )
        return wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=self.name or run.run_id,
            tags=list(self.tags) or None,
            id=run.run_id,
            resume="allow",
            reinit="create_new",  # another run of this process is left alone
            mode=mode,
            dir=str(run.path),
            config=flat_config(config),
            settings=settings,
        )


def _warn_offline(error: Exception) -> None:
    warnings.warn(f"W&B cannot be used online, so the run is logged offline: {error}", stacklevel=3)
