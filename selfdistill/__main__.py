"""selfdistill COMMAND [KEY=VALUE …]

Each command is also a module: `selfdistill train seed=1` is `python -m selfdistill.train seed=1`.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec

from selfdistill import __version__
from selfdistill.config.messages import fail
from selfdistill.config.suggestions import closest

COMMANDS = {
    "train": "train a model, or many (--multirun)",
    "doctor": "look at machine, packages and server before a run does",
    "export": "export a finished run again, or to another format",
    "generate-data": "have a served model write training data",
    "compare": "put runs side by side, with how sure their differences are",
    "workspace": "lay out a W&B workspace for a group of runs",
}
COMPLETION = ("-sc", "--shell-completion")


def commands() -> dict[str, str]:
    """The commands that are there, and what each does."""
    return {name: does for name, does in COMMANDS.items() if find_spec(_module(name)) is not None}


def _module(command: str) -> str:
    return f"selfdistill.{command.replace('-', '_')}"


def usage() -> str:
    listed = "\n".join(f"  {name:<15} {does}" for name, does in commands().items())
    completion = 'eval "$(selfdistill --shell-completion install=bash)"'
    return (
        f"{(__doc__ or '').strip()}\n\ncommands\n{listed}\n\n"
        "selfdistill COMMAND --help lists a command's groups and keys; --version, the version.\n"
        f"Completion in this shell (bash, zsh or fish): {completion}"
    )


def main() -> None:
    """Runs the command that the first argument names.

    Raises:
        SystemExit: it was refused, or ended with an exit code of its own.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(__version__)
        raise SystemExit(0)
    command = arguments[0]
    if command in COMPLETION:
        command = _completed_command()
    elif command in commands():
        del sys.argv[1]
    else:
        meant = "write selfdistill train" if "=" in command or command.startswith("-") else closest(command, commands())
        raise SystemExit(fail(f"{command} is not a command: {meant}"))
    sys.argv[0] = "selfdistill"  # what Hydra's completion is installed for
    import_module(_module(command)).main()


def _completed_command() -> str:
    """The command whose keys the shell asks for, taken out of the line; where it asks for a command, prints them all.

    Raises:
        SystemExit: after the commands.
    """
    line = os.environ.get("COMP_LINE")
    if line is None or sys.argv[2:3] == ["install=bash"]:
        return "train"  # it installs the completion, or says how
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line[-1].isspace()):
        print(" ".join(commands()))
        raise SystemExit(0)
    if words[1] not in commands():
        raise SystemExit(0)
    os.environ["COMP_LINE"] = line.replace(f"{words[1]} ", "", 1)
    return words[1]


if __name__ == "__main__":
    main()
