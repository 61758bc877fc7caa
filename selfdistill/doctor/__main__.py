"""Looks at machine, packages and server before a run does.

    python -m selfdistill.doctor
    python -m selfdistill.doctor hardware=gpu_24gb model=qwen3_0_6b
    python -m selfdistill.doctor teacher.base_url=http://localhost:8000/v1 teacher.model=glm-4.7

Takes the arguments of selfdistill.train. Exit code 1 when something will not work.
"""

from rich.console import Console

from selfdistill.options import main


def run(arguments: list[str]) -> int:
    """The command."""
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print((__doc__ or "").strip())
        return 0
    from selfdistill.doctor import diagnose
    from selfdistill.doctor.lines import table

    lines = diagnose(arguments)
    console = Console(highlight=False, emoji=False)
    console.print(table(lines))
    errors = sum(line.state == "error" for line in lines)
    warnings = sum(line.state == "warning" for line in lines)
    console.print(f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}.")
    return int(errors > 0)


if __name__ == "__main__":
    main(run)
