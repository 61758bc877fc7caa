"""Looks at machine, packages and server before a run does.

    python -m selfdistill.doctor
    python -m selfdistill.doctor hardware=gpu_24gb model=qwen3_0_6b
    python -m selfdistill.doctor teacher.base_url=http://localhost:8000/v1 teacher.model=glm-4.7

Takes the arguments of selfdistill.train. Exit code 1 when something will not work.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from selfdistill.config.conf import CONF
from selfdistill.config.options import main
from selfdistill.errors import UserError
from selfdistill.machine.findings import Line, error, table
from selfdistill.machine.hardware import (
    check_disk,
    check_hub,
    check_memory,
    check_python,
    check_torch,
    check_wandb,
    look_at_accelerator,
)
from selfdistill.machine.packages import check_packages


def compose(overrides: Sequence[str]) -> Any:
    """The configuration that these arguments of `selfdistill.train` give; `teacher.base_url=…` implies `teacher=server`.

    Raises:
        UserError: a key or choice that does not exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from selfdistill import config

    given = list(overrides)
    keys = {argument.lstrip("+~").split("=")[0] for argument in given}
    if any(key.startswith("teacher.") for key in keys) and not keys & {"teacher", "experiment"}:
        given.insert(0, "teacher=server")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("train", given)
    except (HydraException, OmegaConfBaseException) as problem:
        raise UserError(config.explain(problem)) from None


def diagnose(overrides: Sequence[str]) -> list[Line]:
    """All findings for a composition.

    Raises:
        UserError: the composition itself is wrong.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    cfg = compose(overrides)
    accelerator = look_at_accelerator()
    lines = [check_python(), check_torch(accelerator), *check_packages(gpu=bool(accelerator.gpus))]
    lines += check_memory(accelerator, cfg)
    lines += [
        check_hub(cfg.model.name, cfg.model.local_files_only),
        check_disk(Path(cfg.output_dir)),
        check_wandb(cfg.logger),
    ]
    if cfg.teacher is not None and "base_url" in cfg.teacher:
        lines += _served_teacher(cfg)
    return lines


def _served_teacher(cfg: Any) -> list[Line]:
    from omegaconf import OmegaConf

    from selfdistill.machine.served_teacher import check_server

    for key in ("base_url", "model"):
        if OmegaConf.is_missing(cfg.teacher, key):
            return [error("teacher", f"teacher.{key} is missing", f"write teacher.{key}=… on the command line")]
    return check_server(cfg.teacher, missing or _tokenizer(cfg), cfg.rollout.max_completion_tokens)


def _tokenizer(cfg: Any) -> Any:
    """The student's tokenizer, or why it cannot be had."""
    try:
        from transformers import AutoTokenizer

        from selfdistill.models.loading import resolve

        return AutoTokenizer.from_pretrained(
            resolve(cfg.model.name), local_files_only=bool(cfg.model.local_files_only), revision=cfg.model.revision
        )
    except (ImportError, OSError, ValueError) as problem:
        return f"the tokenizer of model.name={cfg.model.name} cannot be loaded ({str(problem).strip().splitlines()[0]})"


def run(arguments: list[str]) -> int:
    """The command."""
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print((__doc__ or "").strip())
        return 0
    lines = diagnose(arguments)
    console = Console(highlight=False, emoji=False)
    console.print(table(lines))
    errors = sum(line.state == "error" for line in lines)
    warnings = sum(line.state == "warning" for line in lines)
    console.print(f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}.")
    return int(errors > 0)


if __name__ == "__main__":
    main(run)
