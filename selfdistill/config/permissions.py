"""What a configuration that somebody else may have written must be allowed anew: to run code, and secrets it lacks.

A run's config.yaml is a file that people hand on. What it asks for beyond the package's own code is granted by the
person who types the command, not by the file.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from selfdistill.config.overrides import key_and_value, key_of
from selfdistill.config.schema import Run
from selfdistill.config.secrets import masked_keys
from selfdistill.errors import UserError, shortened

# Keys of a stored configuration that let it run code; so does a key of the same name in any of its groups.
GRANTS = ("trusted_prefixes", "allow_code_execution", "model.trust_remote_code", "export.llama_cpp")
NAMES = frozenset(key.rpartition(".")[2] for key in GRANTS)
ALWAYS_THERE = GRANTS[:3]  # others are written with `++`: what the command line composes may lack their group
NOTHING = ("", "false", "null", "[]")


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
    wanted = asked_for(saved)
    check_granted(wanted, {key: _value(given, key) for key in wanted if key in written}, command)
    hidden = list(dict.fromkeys(key.split("[")[0] for key in masked_keys(saved)))
    for key in hidden:
        if key not in written:
            raise UserError(
                f"{command}: {key} is secret and was not recorded; give it again: {command} '++{key}=…'. Written as "
                f"'{key}=${{oc.env:VARIABLE}}' when a run is started, it is found by itself."
            )
        OmegaConf.update(saved, key, OmegaConf.select(given, key))
    return {key for key in written if key in (*GRANTS, *wanted, *hidden)}


def asked_for(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """What in a configuration runs code that is not ours, by key.

    A group may repeat what stands above it, as `reward.allow_code_execution` does: that is granted with it.
    """
    found = dict(_named(_plain(config) if isinstance(config, DictConfig) else config))

    def repeated(key: str) -> bool:
        for grant in GRANTS:
            group, _, name = grant.rpartition(".")
            if key != grant and key.endswith(f".{name}") and key.startswith(f"{group}." if group else ""):
                return _within(found[key], found.get(grant))
        return False

    return {key: value for key, value in found.items() if not repeated(key)}


def check_granted(
    wanted: Mapping[str, Any], allowed: Mapping[str, Any], command: str, where: str = "its config.yaml"
) -> None:
    """Raises UserError for the first of what is asked for `where` that the command line does not allow."""
    for key, value in wanted.items():
        if not _within(value, allowed.get(key)):
            grant = shortened(_grant(key, value))
            raise not_granted(command, where, grant.lstrip("+"), grant)


def not_granted(command: str, where: str, found: str, grant: str) -> UserError:
    """What to say of something `where` that runs code of others: what it is, and what allows it."""
    return UserError(
        f"{command}: {where} has {found}, which lets it run code that is not ours. If you know where the folder comes "
        f"from, add {grant}"
    )


def granting(arguments: Iterable[str]) -> list[str]:
    """Those of a command line that let what it composes run code that is not ours."""
    pairs = ((argument, *key_and_value(argument)) for argument in arguments)
    return [
        argument
        for argument, key, value in pairs
        if key.rpartition(".")[2] in NAMES and value not in NOTHING or any(name in value for name in NAMES)
    ]


def resume_command(run: Run, folder: Path) -> str:
    """The command that continues a run, with what its configuration has to be granted again."""
    grants = [shlex.quote(_grant(key, value)) for key, value in asked_for(asdict(run)).items()]
    return " ".join(["python -m selfdistill.train", f"resume={shlex.quote(str(folder))}", *grants])


def _grant(key: str, value: Any) -> str:
    """What is written on the command line to allow it."""
    text = f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return f"{'' if key in ALWAYS_THERE else '++'}{key}={text}"


def _plain(config: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:  # what cannot be resolved is refused, by its name, when the configuration is checked
        return OmegaConf.to_container(config, resolve=False)


def _value(config: DictConfig, key: str) -> Any:
    value = OmegaConf.select(config, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _within(wanted: Any, allowed: Any) -> bool:
    if isinstance(wanted, list):
        return isinstance(allowed, list) and {*map(str, wanted)} <= {*map(str, allowed)}
    return bool(wanted == allowed)


def _named(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of those names, at any depth, that are neither false nor empty."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{path}.{key}" if path else str(key)
            if key in NAMES and item:
                yield inner, item
            yield from _named(item, inner)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _named(item, f"{path}[{index}]")
