"""What may stand in each place of a configuration: an object of one kind, whoever wrote it."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from selfdistill.config.conf import CONF
from selfdistill.errors import UserError

TRL = "trl.rewards."


@dataclass(frozen=True)
class Kind:
    """What one place takes.

    Attributes:
        what: in a word.
        base: the class that ours derive from, or the function that is ours.
        group: the configuration group whose options are of this kind.
        own: what one of the user's own is.
        derived: whether the user's own classes derive from the base too; otherwise they may be anything.
    """

    what: str
    base: str
    group: str
    own: str = ""
    derived: bool = True


REWARD = Kind(
    "a reward", "selfdistill.rewards.base.Reward", "reward", "any function or class that is called as they are", False
)
# The first pattern that a key matches decides.
KINDS = {
    r"data|(tasks|probes)\.[^.]+": Kind(
        "a loader of data",
        "selfdistill.data.loading.load_data",
        "data",
        "any function that returns selfdistill.data.DataSplits",
        False,
    ),
    r"(reward|eval\.(retention_)?scorer|teacher\.keep|keep)(\.rewards\.[^.]+)?": REWARD,
    r"teacher": Kind("a teacher", "selfdistill.teachers.interface.BaseTeacher", "teacher"),
    r"teacher\.weights": Kind("weights of a teacher", "selfdistill.teachers.weights.Weights", "teacher/weights"),
    r"teacher\.context": Kind("a teacher's context", "selfdistill.teachers.context.Context", "teacher/context"),
    r"eval": Kind("settings of an evaluation", "selfdistill.evaluation.evaluator.EvalSettings", "eval"),
    r"monitors": Kind("a set of monitors", "selfdistill.evaluation.monitors.Monitors", "monitors"),
    r"logger": Kind("a logger", "selfdistill.runs.loggers.base.RunLogger", "logger"),
    r"export": Kind("a set of export formats", "selfdistill.models.export.Exports", "export"),
    r"export\.formats\.[^.]+": Kind("an export format", "selfdistill.models.export.Format", "export"),
}


def kind_of(key: str) -> Kind | None:
    """What a key takes; None for arguments of the user's own classes, which may be of any kind."""
    return next((kind for pattern, kind in KINDS.items() if re.fullmatch(pattern, key)), None)


def check_kind(key: str, node: Mapping[str, Any], target: Callable[..., Any]) -> None:
    """Checks that what a `_target_` names is what the place where it stands takes.

    That a module is trusted is not enough: among our classes are some that run programs.

    Raises:
        UserError: it is of another kind.
    """
    name, kind = node["_target_"], kind_of(key)
    ours = name.startswith(("selfdistill.", TRL))
    if kind is None:
        if ours and not any(_fits(name, target, one) for one in KINDS.values()):
            raise UserError(f"{key}._target_={name} is nothing that a configuration builds: leave it out.")
        return
    if node.get("_partial_") and kind.derived:
        raise UserError(f"{key}._target_={name} is built once: write {key}._partial_=false.")
    # What a function of the user's own returns is not known before it is called.
    if not _fits(name, target, kind) and (ours or (kind.derived and inspect.isclass(target))):
        options = ", ".join(sorted(file.stem for file in (CONF / kind.group).glob("[!_]*.yaml")))
        raise UserError(
            f"{key}._target_={name} is not {kind.what}. The options of the group {kind.group} are ({options}); one of "
            f"your own is {kind.own or f'a class with the base {kind.base}'}."
        )


def _fits(name: str, target: Callable[..., Any], kind: Kind) -> bool:
    if kind is REWARD and name.startswith(TRL):
        return True
    module, _, attribute = kind.base.rpartition(".")
    base = getattr(import_module(module), attribute)
    return target is base or (inspect.isclass(base) and inspect.isclass(target) and issubclass(target, base))
