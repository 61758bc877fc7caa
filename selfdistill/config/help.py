"""The commands' flags and their help: every group, option and key with its meaning, from the files themselves."""

import os
import re
import sys
from collections.abc import Sequence
from glob import glob
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

import yaml
from hydra._internal.utils import get_args_parser

from selfdistill.config.messages import WITHOUT
from selfdistill.config.suggestions import closest
from selfdistill.errors import LONGEST_VALUE, UserError, shortened

FLAGS = """\
flags
  --cfg job        print the composed configuration, and stop
  --config-dir DIR a folder of your own with groups and options, beside these
  --config-name F  a primary configuration of your own, from that folder
  --hydra-help     what Hydra itself can do"""


def command_line(
    arguments: Sequence[str], file: Path, usage: str, *, sweeps: bool = False, words: str | None = None
) -> list[str]:
    """The arguments as Hydra takes them: `--check` as a key, flags before keys. `--help` prints our help and ends.

    It replaces Hydra's, which copies all configurations for every group that it lists and so takes a second.

    Args:
        file: the command's primary configuration.
        usage: the first lines of the help.
        sweeps: whether `--multirun` is allowed.
        words: the key that takes the words that are neither flags nor KEY=VALUE; a path may hold an equals sign.

    Raises:
        SystemExit: after the help.
        UserError: an unknown flag, or one without its value.
    """
    arguments = ["check=true" if argument == "--check" else argument for argument in arguments]
    plain = [a for a in arguments if words and not a.startswith("-") and glob(a)]
    keys = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~")) and a not in plain]
    for key in keys:
        _check_choice(key, file)
    arguments = [*(a for a in arguments if a not in keys), *keys]
    parser = get_args_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]

    def refuse(message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (\S+).*", message)
        raise UserError(
            f"{unknown[1]} is not a flag: {closest(unknown[1], [*flags, '--check'])}" if unknown else message
        )

    parser.error = refuse  # type: ignore[method-assign]
    given = parser.parse_args(arguments)
    if words and (plain := [word for word in given.overrides if word not in keys]):
        keyed = [_with_its_equals_sign(argument) for argument in arguments if argument not in plain]
        arguments = [*keyed, f"{words}=[{','.join(map(_quoted, plain))}]"]
    if given.help:
        try:
            print(help_text(file, usage), flush=True)
        except BrokenPipeError:  # `| head` closes the pipe early
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    if given.config_path:
        raise UserError(
            f"--config-path={shortened(given.config_path)} would take the place of selfdistill's own configuration: "
            f"write --config-dir={shortened(given.config_path)}, which adds a folder of your own to it."
        )
    if given.shell_completion:
        _check_completion(given.overrides)
    if given.experimental_rerun:
        raise UserError("--experimental-rerun is not for these runs: continue one with resume=outputs/RUN.")
    if given.multirun and not sweeps:
        raise UserError("--multirun is for selfdistill.train alone.")
    chosen = [flag for flag, on in (("--multirun", given.multirun), ("--cfg", given.cfg), ("--info", given.info)) if on]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} cannot be given together.")
    if given.resolve and not given.cfg:
        raise UserError("--resolve belongs to --cfg.")
    return arguments


def _quoted(text: str) -> str:
    """A text in quotes, as Hydra's grammar has them."""
    return "'{}'".format(text.replace("\\", "\\\\").replace("'", "\\'"))


def _with_its_equals_sign(argument: str) -> str:
    """KEY=VALUE with the value in quotes where it is a text that holds an equals sign, which Hydra refuses."""
    key, _, value = argument.partition("=")
    return f"{key}={_quoted(value)}" if "=" in value and value[0] not in "'\"[{" else argument


def _check_choice(argument: str, file: Path) -> None:
    """Raises UserError where a group is given something that cannot be an option; Hydra expects texts there."""
    name, equals, value = argument.lstrip("+~").partition("=")
    group, groups = name.split("@")[0], _groups(file)
    if not name.strip():
        raise UserError(f"{shortened(argument)} has no key: write KEY=VALUE.")
    is_group = group in groups or "/" in group or group == "hydra"
    if not (is_group and equals) or _is_choice(argument):
        return
    instead = "choose one of its options, or leave it out"
    if value == "null" and group in WITHOUT:
        instead = f"to do without write {group}={WITHOUT[group]}"
    elif (file.parent / group).is_dir():
        options = [entry.stem for entry in (file.parent / group).glob("*.yaml")]
        instead = f"write the name of an option; {closest(shortened(value), options)}"
    raise UserError(f"{name}={shortened(value)}: {instead.removesuffix('.')}.")


def _is_choice(argument: str) -> bool:
    """Whether the value is a text that can name an option, or several of them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob, QuotedString
    from hydra.errors import OverrideParseException

    try:
        (parsed,) = OverridesParser.create().parse_overrides([argument])
    except OverrideParseException:
        return True  # Hydra says what is wrong with it
    value = parsed._value
    values = getattr(value, "list", value) if parsed.is_sweep_override() else value
    if isinstance(values, Glob):
        return True
    listed = values if isinstance(values, list) else [values]
    return all(isinstance(v, str | QuotedString) and len(str(v)) <= LONGEST_VALUE for v in listed)


def _check_completion(arguments: Sequence[str]) -> None:
    task, _, shell = "".join(arguments).partition("=")
    if len(arguments) != 1 or task not in ("install", "uninstall", "query") or shell not in ("bash", "zsh", "fish"):
        raise UserError(
            '--shell-completion: write eval "$(selfdistill --shell-completion install=bash)", or zsh, fish.'
        )
    if task == "query" and "COMP_LINE" not in os.environ:
        raise UserError("--shell-completion query= is what the shell asks, with the line in COMP_LINE: write install=.")


def help_text(file: Path, usage: str) -> str:
    """Usage, flags, groups and keys of the command with this primary configuration."""
    text = file.read_text(encoding="utf-8")
    keys = re.sub(r"\A(?:#.*\n)+|^(?:defaults|hydra):.*\n(?:[ -].*\n)*", "", text, flags=re.MULTILINE).strip()
    groups = [_group(file.parent / group, group) for group in _groups(file)]
    listed = ["groups (GROUP=OPTION)", *groups] if groups else []
    return "\n\n".join([usage.strip(), FLAGS, *listed, f"keys (KEY=VALUE)\n\n{keys}"])


def _groups(file: Path) -> list[str]:
    """The groups that a primary configuration chooses from."""
    defaults = yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]
    entries = [key for entry in defaults if isinstance(entry, dict) for key in entry]
    return [entry for entry in entries if not entry.startswith("override ") and "@" not in entry]


def _group(folder: Path, name: str) -> str:
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(("_", "."))]
    lines = [f"  {entry.stem:<20} {_first_sentence(entry)}" for entry in entries if entry.suffix == ".yaml"]
    inner = [f"\n{_group(entry, f'{name}/{entry.name}')}" for entry in entries if entry.is_dir()]
    return "\n".join([f"{name}=", *lines, *inner])


def _first_sentence(file: Path) -> str:
    head = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    comments = [line.lstrip("# ") for line in head if not line.startswith("# @package")]
    return re.split(r"(?<=[.])\s", " ".join(comments))[0]
