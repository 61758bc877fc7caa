"""One message for the person who made the mistake: which key, what is wrong, what to write instead."""

import os
import re
import sys
import time

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigKeyError, InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from selfdistill.config.conf import CONF
from selfdistill.config.schema import Run
from selfdistill.config.suggestions import closest
from selfdistill.config.trl_names import OUR_KEYS, instead_of
from selfdistill.errors import UserError, bounded, first_line, shortened
from selfdistill.text import escaped

# What Hydra and OmegaConf raise for a mistake on the command line or in a configuration file.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
# How to do without a group; the others are always there.
WITHOUT = {"reward": "none", "teacher": "none", "eval": "none", "export": "none", "logger": "none", "monitors": "off"}

# How long the first of several processes has to say what all have to say.
FIRST_SAYS_S = 10.0
# Choices of Hydra's plugins, which come with the extra `sweep`.
SWEEP_EXTRA = (
    "hydra/sweeper=optuna", "hydra/launcher=joblib", "hydra/launcher=submitit_local", "hydra/launcher=submitit_slurm",
)  # fmt: skip


def fail(message: str, *, alone: bool = False) -> int:
    """Prints the message, which may quote a completion, and gives the exit code of a refused command.

    Args:
        alone: whether no other process of the command has this to say. Otherwise the first one says it, and the
            launcher ends the others as soon as that one is gone; they speak if it has not.
    """
    if not alone and int(os.environ.get("RANK", 0)) > 0:
        time.sleep(FIRST_SAYS_S)
    print(f"selfdistill: {escaped(bounded(message))}", file=sys.stderr)
    return 2


def explain(error: BaseException) -> str:
    """A UserError's message, or Hydra's, OmegaConf's or YAML's error as one line that names the key or the file."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, YAMLError):
        return _yaml(error)
    if isinstance(error, OverrideParseException):
        return _syntax(error)
    if isinstance(error, ConfigKeyError):
        return unknown_key(str(error.full_key), error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: write {error.full_key}=… on the command line."
    if isinstance(error, InterpolationKeyError):
        return f"{error.full_key} refers to a key that does not exist: {str(error).splitlines()[0]}."
    text = str(error)
    # Of several options in brackets, Hydra doesn't list which there are.
    if match := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        options = [option for option in re.findall(r"^\t(\S+)$", text, flags=re.M) if not option.startswith("_")]
        options = options or [file.stem for file in (CONF / match[1]).glob("[!_]*.yaml")]
        if f"{match[1]}={match[2]}" in SWEEP_EXTRA:
            return f"{match[1]}={match[2]} is not installed: pip install 'selfdistill[sweep]' brings it."
        return f"{match[1]}={match[2]}: there is no such choice; {closest(match[2], options)}"
    if match := re.search(r"Could not override '([^']+)'\.\s+No match in the defaults list", text):
        first = "Choose that first, e.g. teacher=demonstration teacher/weights=ema."
        return f"{match[1]}=…: what was chosen above it has no such group. {first}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1], error)
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"+{match[1]}: the key is there already; write {match[1]}=VALUE without the plus sign."
    if match := re.search(r"Could not delete from config\. '([^']+)' does not exist", text):
        meant = closest(match[1].split(".")[0], Run.__dataclass_fields__)
        return f"~{match[1]}: there is no such key to remove; {meant}"
    if match := re.search(r"Ambiguous value for argument '(([^'=]+)=([^']*))'", text):
        one_list = f"{match[2]}=[{match[3]}]"
        return f"{match[1]}: several values are a sweep, which needs --multirun; for one list write {one_list}."
    if match := re.search(r"Multiple values for (\S+)\. To override a value use 'override \S+ (\S+)'", text):
        chosen = f"{match[1]}={match[2]}"
        return f"+{chosen}: this group is chosen already; write {chosen} without the plus sign."
    return _general(error)


def _cause(error: BaseException) -> BaseException:
    """OmegaConf's own error, under Hydra's."""
    while isinstance(error.__cause__, OmegaConfBaseException):
        error = error.__cause__
    return error


def unknown_key(key: str, error: BaseException) -> str:
    """That there is no such key, and which one may have been meant."""
    above, _, last = key.rpartition(".")
    cause = _cause(error)
    parent = cause.parent_node if isinstance(cause, OmegaConfBaseException) else None
    known = [
        name for name in (parent if isinstance(parent, DictConfig) else Run.__dataclass_fields__) if name != "hydra"
    ]
    if above == "training.arguments":
        return f"{key} is not a key: {_argument(last)}"
    if above == "eval.scorer":
        return f"{key} is not a key: choose the judge first, e.g. reward@eval.scorer=exact_match."
    return f"{key} is not a key: {closest(last, known) if known else f'{above} has no keys here.'}"


def _argument(name: str) -> str:
    if name in OUR_KEYS:
        return instead_of(name)
    return f"to add it among the arguments of trl.GRPOConfig write a plus sign, +training.arguments.{name}=…"


def _syntax(error: OverrideParseException) -> str:
    first = first_line(error)
    quoted = "quotes around special characters: 'KEY=\"VALUE\"'"
    return f"{shortened(str(error.override))} cannot be read: {first}. Write KEY=VALUE, and {quoted}."


def _yaml(error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    return f"a configuration file: {str(error).splitlines()[0]}"


def _general(error: BaseException) -> str:
    cause = _cause(error)
    keys = [e.full_key for e in (cause, error) if isinstance(e, OmegaConfBaseException) and e.full_key]
    text = str(cause).strip() or str(error).strip() or type(error).__name__
    first = text.splitlines()[0].strip()
    return f"{keys[0]}: {first}" if keys and keys[0] not in first else first
