"""What the commands have in common: Hydra composes, a mistake is one message, and the exit code says how it went.

Exit codes: 0 done, 1 failed, 2 refused, 130 interrupted.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfdistill.config.help import command_line
from selfdistill.config.hydra_keys import guarded_composition
from selfdistill.config.messages import COMPOSITION_ERRORS, explain, fail
from selfdistill.config.targets import check_target, check_trust, make, targets
from selfdistill.errors import UserError

Settings = TypeVar("Settings")


def main(
    file: Path, task: Callable[[DictConfig], Any], usage: str | None, *, sweeps: bool = False, words: str | None = None
) -> None:
    """Run a task on the configuration that the command line composes.

    Args:
        file: the primary configuration; `--config-name` may name another.
        usage: the first lines of the help.
        sweeps: whether the command may be given `--multirun`.
        words: the key that takes the words of the command line that are neither flags nor KEY=VALUE, as a list.

    Raises:
        SystemExit: the command was refused, interrupted, or asked for help.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed as tracebacks

    @functools.wraps(task)
    def refusing(cfg: DictConfig) -> Any:
        try:
            return task(cfg)
        except (UserError, *COMPOSITION_ERRORS) as error:
            raise SystemExit(fail(explain(error))) from None  # Hydra would print a line of its own before an Exception

    try:
        sys.argv[1:] = command_line(sys.argv[1:], file, usage or "", sweeps=sweeps, words=words)
        with guarded_composition():
            hydra.main(version_base="1.3", config_path=str(file.parent), config_name=file.stem)(refusing)()
    except (UserError, *COMPOSITION_ERRORS) as error:
        raise SystemExit(fail(explain(error))) from None
    except KeyboardInterrupt:
        fail("interrupted.")
        raise SystemExit(130) from None


def typed(schema: type[Settings], cfg: DictConfig) -> Settings:
    """The configuration as an instance of a dataclass.

    Raises:
        UserError: a key that was added and is unknown, a value that is missing or of the wrong type.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None


def listed(value: Any) -> list[str]:
    """The texts of a key that takes one text or a list of them."""
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def built(cfg: DictConfig, key: str) -> Any:
    """Builds a group, once its `_target_`s are trusted and their arguments fit; None where the group is null.

    Raises:
        UserError: a `_target_` that is not trusted, does not exist or is of another kind, or an argument that it
            refuses.
    """
    node: Any = OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]
    for where, inner in targets(node, key):
        check_trust(where, inner["_target_"], cfg.trusted_prefixes)
        check_target(where, inner)
    return make(node, key)
