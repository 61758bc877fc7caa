"""What may be configured, and what is said of a configuration that cannot be meant. Imports nothing heavy.

Unknown keys (also those added with `+`), types, ranges, choices and combinations are refused here before torch is
imported; the signatures behind `_target_`s are bound by `selfdistill.config.targets` afterwards, before weights load.
"""

from typing import Any

from selfdistill.config.checks import check
from selfdistill.config.help import command_line
from selfdistill.config.messages import COMPOSITION_ERRORS, explain, fail
from selfdistill.config.schema import Run

__all__ = [
    "COMPOSITION_ERRORS",
    "Run",
    "check",
    "command_line",
    "explain",
    "fail",
    "run_name",
]


def run_name(run: Run, choices: Any = None) -> str:
    """What a run is called: its own name, the experiment, or the reward and teacher it is made of."""
    if run.name:
        return run.name
    chosen = {key: value for key, value in dict(choices or {}).items() if value not in (None, "null", "none")}
    return str(
        chosen.get("experiment") or "-".join(str(chosen[k]) for k in ("reward", "teacher") if k in chosen) or "run"
    )
