"""The command's flags and its help: every group with its options, every key with its meaning, from the files themselves."""

import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from selfdistill.config.conf import CONF
from selfdistill.config.messages import WITHOUT
from selfdistill.config.suggestions import closest
from selfdistill.errors import UserError

HEAD = """\
python -m selfdistill.train [GROUP=OPTION …] [KEY=VALUE …] [FLAG …]

  python -m selfdistill.train                               the embedded model on whatever machine this is
  python -m selfdistill.train experiment=sdft seed=1        a published method
  python -m selfdistill.train model=qwen3_0_6b hardware=gpu_24gb data=jsonl data.path=my.jsonl export=lora
  python -m selfdistill.train --multirun experiment=sdpo beta=0,0.04 alpha=0,0.5,1
  python -m selfdistill.train resume=outputs/RUN            continue a run

flags
  --check          compose and check everything, show the plan, and stop
  --cfg job        print the composed configuration, and stop
  --multirun, -m   one run for each combination of the values that are given with commas
  --config-dir DIR a folder of your own with groups and options, beside these
  --hydra-help     what Hydra itself can do
"""


def command_line(arguments: list[str]) -> list[str]:
    """The arguments as Hydra takes them: `--check` as a key, flags before keys. Prints the help where it is asked for.

    Hydra's own help copies its whole repository of configurations for every group that it lists, which takes a second.

    Raises:
        SystemExit: after the help.
        UserError: an unknown flag, or one without its value.
    """
    arguments = ["check=true" if argument == "--check" else argument for argument in arguments]
    for group in (folder.name for folder in CONF.iterdir() if folder.is_dir()):
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
            print(help_text(), flush=True)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    if given.experimental_rerun:
        raise UserError("--experimental-rerun is not for these runs: continue one with resume=outputs/RUN.")
    shown = [flag for flag, on in (("--multirun", given.multirun), ("--cfg", given.cfg), ("--info", given.info)) if on]
    if len(shown) > 1:
        raise UserError(f"{' and '.join(shown)} cannot be given together.")
    if given.resolve and not given.cfg:
        raise UserError("--resolve belongs to --cfg.")
    return arguments


def help_text() -> str:
    """Flags, groups and keys."""
    groups = "\n".join(_group(folder, folder.name) for folder in _sorted(CONF) if folder.is_dir() and _public(folder))
    keys = (CONF / "train.yaml").read_text(encoding="utf-8").partition("\n# What people sweep")
    return f"{HEAD}\ngroups (GROUP=OPTION)\n{groups}\nkeys (KEY=VALUE)\n\n{(keys[1] + keys[2]).strip().partition(chr(10) + 'hydra:')[0]}"


def _group(folder: Path, name: str) -> str:
    files = [file for file in _sorted(folder) if file.name.endswith(".yaml") and _public(file)]
    lines = [f"  {file.name.removesuffix('.yaml'):<20} {_first_sentence(file)}" for file in files]
    inner = [
        _group(inside, f"{name}/{inside.name}") for inside in _sorted(folder) if inside.is_dir() and _public(inside)
    ]
    return "\n".join([f"\n{name}=", *lines, *inner])


def _first_sentence(file: Path) -> str:
    head = re.match(r"(?:#.*\n)*", file.read_text(encoding="utf-8"))
    comments = [line.lstrip("# ") for line in head[0].splitlines() if not line.startswith("# @package")] if head else []
    return re.split(r"(?<=[.])\s", " ".join(comments))[0]


def _sorted(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda entry: entry.name)


def _public(entry: Path) -> bool:
    return not entry.name.startswith(("_", "."))
