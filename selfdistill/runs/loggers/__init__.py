"""Loggers: where the metrics of a run are shown, besides the run's folder, which always has them."""

from selfdistill.runs.console import flat
from selfdistill.runs.loggers.base import NoLogger, RunLogger
from selfdistill.runs.loggers.trackio import TrackioLogger
from selfdistill.runs.loggers.wandb import WandbLogger

__all__ = ["NoLogger", "RunLogger", "TrackioLogger", "WandbLogger", "flat"]
