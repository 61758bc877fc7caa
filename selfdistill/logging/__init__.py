"""Loggers: where the metrics of a run are shown, besides the run's folder, which always has them."""

from selfdistill.logging.base import NoLogger, RunLogger, flat, multirun_group
from selfdistill.logging.trackio import TrackioLogger
from selfdistill.logging.wandb import WandbLogger

__all__ = ["NoLogger", "RunLogger", "TrackioLogger", "WandbLogger", "flat", "multirun_group"]
