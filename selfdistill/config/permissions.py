"""What a configuration that somebody else may have written must be allowed anew: to run code, and secrets it lacks.

A run's config.yaml is a file that people hand on. What it asks for beyond the package's own code is granted by the
person who types the command, not by the file.
"""

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfdistill.config.overrides import key_of
from selfdistill.config.schema import Run
from selfdistill.config.secrets import masked_keys
from selfdistill.errors import UserError, shortened

# Keys of a stored configuration that let it run code.
GRANTS = ("trusted_prefixes", "allow_code_execution", "model.trust_remote_code")


def granted_again(saved: DictConfig, given: DictConfig, overrides: Iterable[str], command: str) -> set[str]:
    """Takes over from the command line what the stored configuration may not have by itself.

    Args:
        saved: as it was stored; secrets that the command line names are put into it.
        given: what the command line composes.
        overrides: the command line's keys.
        command: the command that was given, for messages.

    Returns:
        The keys of the command line that were meant for this.

    Raises:
        UserError: something that runs code is not granted on the command line, or a secret is missing.
    """
    written = {key_of(override): override for override in overrides}
    remote = [path for path in _remote_code(OmegaConf.to_container(saved, resolve=False)) if path not in GRANTS]
    for key in (*GRANTS, *remote):
        wanted, allowed = OmegaConf.select(saved, key), OmegaConf.select(given, key) if key in written else None
        if not _within(wanted, allowed):
            value = f"[{','.join(map(str, wanted))}]" if OmegaConf.is_list(wanted) else str(wanted).lower()
            grant = f"{'++' if key in remote else ''}{key}={shortened(value)}"
            raise UserError(
                f"{command}: its config.yaml has {grant.lstrip('+')}, which lets it run code that is not ours. If "
                f"you know where the folder comes from, add {grant}"
            )
    hidden = list(dict.fromkeys(key.split("[")[0] for key in masked_keys(saved)))
    for key in hidden:
        if key not in written:
            raise UserError(
                f"{command}: {key} is secret and was not recorded; give it again: {command} '++{key}=…'. Written as "
                f"'{key}=${{oc.env:VARIABLE}}' when a run is started, it is found by itself."
            )
        OmegaConf.update(saved, key, OmegaConf.select(given, key))
    return {key for key in written if key in (*GRANTS, *remote, *hidden)}


def resume_command(run: Run, folder: Path) -> str:
    """The command that continues a run, with what its configuration has to be granted again."""
    words = [f"resume={shlex.quote(str(folder))}"]
    if run.trusted_prefixes:
        words.append(shlex.quote(f"trusted_prefixes=[{','.join(run.trusted_prefixes)}]"))
    if run.allow_code_execution:
        words.append(f"allow_code_execution={str(run.allow_code_execution).lower()}")
    if run.model.trust_remote_code:
        words.append("model.trust_remote_code=true")
    return f"python -m selfdistill.train {' '.join(words)}"


def _within(wanted: Any, allowed: Any) -> bool:
    if OmegaConf.is_list(wanted):
        return set(wanted) <= set(allowed or ())
    return not wanted or wanted == allowed


def _remote_code(value: Any, path: str = "") -> Iterator[str]:
    """The keys named `trust_remote_code`, at any depth, that are true."""
    if isinstance(value, dict):
        for key, item in value.items():
            inner = f"{path}.{key}" if path else str(key)
            if key == "trust_remote_code" and item:
                yield inner
            yield from _remote_code(item, inner)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _remote_code(item, f"{path}[{index}]")
