"""What may be configured, and what the user is told about a mistake. Imports nothing heavy.

Unknown keys (also those added with `+`), wrong types, ranges, choices and combinations are refused before torch is
imported. Afterwards, before weights load, `selfdistill.config.targets` compares the arguments of every `_target_` with
its signature.
"""

from collections.abc import Mapping

from selfdistill.config.checks import check
from selfdistill.config.messages import COMPOSITION_ERRORS, explain, fail
from selfdistill.config.schema import Run

__all__ = ["COMPOSITION_ERRORS", "Run", "check", "explain", "fail", "run_name"]


def run_name(run: Run, choices: Mapping[str, str | None]) -> str:
    """What a run is called: its own name, the experiment, or the reward and teacher it is made of.

    Args:
        choices: the option that was chosen of each group.
    """
    chosen = {group: option for group, option in choices.items() if option not in (None, "null", "none")}
    parts = [str(chosen[group]) for group in ("reward", "teacher") if group in chosen]
    return run.name or chosen.get("experiment") or "-".join(parts) or "run"
