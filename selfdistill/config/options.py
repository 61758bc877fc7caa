"""Settings of the small commands: `key=value` on the command line, typed by a dataclass."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from selfdistill.config.suggestions import closest
from selfdistill.errors import UserError

T = TypeVar("T")


def parse(
    schema: type[T], arguments: Sequence[str], *, known: Sequence[str] = (), open_groups: Sequence[str] = ()
) -> T:
    """An instance of a dataclass from `key=value` arguments; `--key value` and `--key=value` mean the same.

    Args:
        known: other keys that may be given, with dots, for dataclasses that are nested.
        open_groups: keys below which anything may stand.

    Raises:
        UserError: an unknown key (the closest one is named), a value of the wrong type, a mandatory key left out.
    """
    given = _as_pairs(arguments)
    names = [field.name for field in fields(schema)]  # type: ignore[arg-type]
    for argument in given:
        key = argument.split("=", 1)[0]
        if key not in names and key not in known and key.split(".")[0] not in open_groups:
            raise UserError(f"{key} is not a key: {closest(key, [*names, *known])}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_cli(given))
        OmegaConf.to_container(merged, throw_on_missing=True)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is missing: write {error.full_key}=… on the command line.") from None
    except (OmegaConfBaseException, ValueError) as error:
        where = getattr(error, "full_key", None)
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{where}: {first}" if where else first) from None


def _as_pairs(arguments: Sequence[str]) -> list[str]:
    pairs: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--"):
            argument = argument[2:]
            if "=" not in argument and rest and not rest[0].startswith("--"):
                argument += f"={rest.pop(0)}"
        if "=" not in argument:
            raise UserError(f"{argument}: write key=value, for example {argument.lstrip('-')}=…")
        pairs.append(argument)
    return pairs


def usage(schema: type, text: str, explanations: dict[str, str]) -> str:
    """Help: the text, then every key with its default and what it means."""
    lines = [text.strip(), ""]
    for field in fields(schema):
        default = field.default_factory() if field.default_factory is not NO_DEFAULT else field.default
        shown = "(needed)" if default == "???" else f"({'null' if default is None else default})"
        lines.append(f"  {field.name:<22} {explanations[field.name]} {shown}")
    return "\n".join(lines)


def main(run: Callable[[list[str]], int]) -> None:
    """Run a command: its exit code; a `UserError` is one message and exit code 2, an interrupt exit code 130."""
    try:
        raise SystemExit(run(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None


def plain(value: Any) -> Any:
    """An OmegaConf container as plain Python values; anything else as it is."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
