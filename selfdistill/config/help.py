"""The commands' flags and their help: every group, option and key with its meaning, from the files themselves."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from hydra._internal.utils import get_args_parser

from selfdistill.config.messages import WITHOUT
from selfdistill.config.suggestions import closest
from selfdistill.errors import UserError

FLAGS = """\
flags
  --cfg job        print the composed configuration, and stop
  --config-dir DIR a folder of your own with groups and options, beside these
  --config-name F  a primary configuration of your own, from that folder
  --hydra-help     what Hydra itself can do"""


def command_line(arguments: Sequence[str], file: Path, usage: str, *, sweeps: bool = False) -> list[str]:
    """The arguments as Hydra takes them: `--check` as a key, flags before keys. Prints the help where it is asked for.

    Hydra's own help copies its whole repository of configurations for every group that it lists, which takes a second.

    Args:
        file: the command's primary configuration.
        usage: the first lines of the help.
        sweeps: whether `--multirun` is allowed.

    Raises:
        SystemExit: after the help.
        UserError: an unknown flag, or one without its value.
    """
    arguments = ["check=true" if argument == "--check" else argument for argument in arguments]
    for group in _groups(file):
        if f"{group}=null" in arguments:
            if group not in WITHOUT:
                raise UserError(f"{group}=null: choose one of its options, or leave it out.")
            raise UserError(f"{group}=null: to do without write {group}={WITHOUT[group]}.")
    keys = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
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
    if given.help:
        try:
            print(help_text(file, usage), flush=True)
        except BrokenPipeError:  # `| head` closes the pipe early
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
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


def help_text(file: Path, usage: str) -> str:
    """Usage, flags, groups and keys of the command with this primary configuration."""
    text = file.read_text(encoding="utf-8")
    keys = re.sub(r"\A(?:#.*\n)+|^(?:defaults|hydra):.*\n(?:[ -].*\n)*", "", text, flags=re.MULTILINE).strip()
    groups = [_group(file.parent / group, group) for group in _groups(file)]
    parts = [
        usage.strip(),
        FLAGS,
        *(["groups (GROUP=OPTION)", *groups] if groups else []),
        f"keys (KEY=VALUE)\n\n{keys}",
    ]
    return "\n\n".join(parts)


def _groups(file: Path) -> list[str]:
    """The groups that a primary configuration chooses from."""
    defaults = yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]
    entries = [key for entry in defaults if isinstance(entry, dict) for key in entry]
    return [entry for entry in entries if not entry.startswith("override ")]


def _group(folder: Path, name: str) -> str:
    files = [file for file in _sorted(folder) if file.name.endswith(".yaml") and _public(file)]
    lines = [f"  {file.name.removesuffix('.yaml'):<20} {_first_sentence(file)}" for file in files]
    inner = [
        _group(inside, f"{name}/{inside.name}") for inside in _sorted(folder) if inside.is_dir() and _public(inside)
    ]
    return "\n".join([f"{name}=", *lines, *(f"\n{group}" for group in inner)])


def _first_sentence(file: Path) -> str:
    head = re.match(r"(?:#.*\n)*", file.read_text(encoding="utf-8"))
    comments = [line.lstrip("# ") for line in head[0].splitlines() if not line.startswith("# @package")] if head else []
    return re.split(r"(?<=[.])\s", " ".join(comments))[0]


def _sorted(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda entry: entry.name)


def _public(entry: Path) -> bool:
    return not entry.name.startswith(("_", "."))
