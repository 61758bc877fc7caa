"""What may be configured, and what is said of a configuration that cannot be meant. Imports nothing heavy.

Unknown keys (also those added with `+`), types, ranges, choices and combinations are refused here before torch is
imported; the signatures behind `_target_`s are bound by `selfdistill.training.build` afterwards, before weights load.
"""

from typing import Any

from omegaconf import DictConfig

from selfdistill.config.checks import check, mismatch, targets
from selfdistill.config.help import command_line
from selfdistill.config.messages import COMPOSITION_ERRORS, explain, fail

__all__ = [
    "COMPOSITION_ERRORS",
    "check",
    "command_line",
    "explain",
    "fail",
    "mismatch",
    "run_name",
    "targets",
]


def run_name(cfg: DictConfig, choices: Any = None) -> str:
    """What a run is called: its own name, the experiment, or the reward and teacher it is made of."""
    if cfg.name:
        return str(cfg.name)
    chosen = {key: value for key, value in dict(choices or {}).items() if value not in (None, "null", "none")}
    return str(
        chosen.get("experiment") or "-".join(str(chosen[k]) for k in ("reward", "teacher") if k in chosen) or "run"
    )
