"""Looks at machine, packages and server before a run does.

    python -m selfdistill.doctor
    python -m selfdistill.doctor hardware=gpu_24gb model=qwen3_0_6b
    python -m selfdistill.doctor teacher.base_url=http://localhost:8000/v1 teacher.model=glm-4.7

Takes the arguments of selfdistill.train; teacher.base_url alone means teacher=server. Exit code 1 when something will
not work.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig
from rich.console import Console

from selfdistill import config
from selfdistill.config import doors
from selfdistill.config.conf import CONF
from selfdistill.config.overrides import key_of
from selfdistill.errors import UserError
from selfdistill.machine import hardware, packages
from selfdistill.machine.findings import Line, error, ok, table, warning
from selfdistill.runs.loggers import WandbLogger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_server(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `teacher=server` where a key of the teacher is given and nothing chooses a teacher."""
    keys = {key_of(argument) for argument in arguments}
    implied = any(key.startswith("teacher.") for key in keys) and not keys & {"teacher", "experiment"}
    return [*arguments, "teacher=server"] if implied else list(arguments)


def diagnose(cfg: DictConfig, run: config.Run) -> list[Line]:
    """All findings for a composition and what its checks have made of it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    accelerator = hardware.look_at_accelerator()
    lines = [
        hardware.check_python(),
        hardware.check_torch(accelerator),
        *packages.check_packages(gpu=bool(accelerator.gpus)),
        *hardware.check_memory(accelerator, cfg),
        hardware.check_hub(cfg.model.name, cfg.model.local_files_only),
        hardware.check_disk(Path(cfg.output_dir)),
        hardware.check_wandb(cfg.logger is not None and issubclass(get_class(cfg.logger._target_), WandbLogger)),
    ]
    server = _check_server(cfg) if cfg.teacher is not None and "base_url" in cfg.teacher else []
    language = _check_language(run, ask_server=all(line.state != "error" for line in server))
    return [*lines, *server, *language, *_check_sandbox()]


def _check_sandbox() -> list[Line]:
    """What would protect this machine from code that the model writes. Its modules need torch, which may be broken."""
    try:
        from selfdistill.rewards import sandbox
    except ImportError:
        return []
    found = sandbox.bubblewrap()
    if isinstance(found, str):
        advice = "only reward=python_tests needs it: install bubblewrap, or name a server with reward.sandbox_url"
        return [warning("sandbox for code", found, advice)]
    return [ok("sandbox for code", found.name)]


def _check_language(run: config.Run, *, ask_server: bool) -> list[Line]:
    """Lines for how student and teacher are asked and end. Imported here, because it needs torch, as below."""
    try:
        from selfdistill.training.language import language_findings

        found = language_findings(run, ask_server=ask_server)
    except ImportError:
        return []  # said by the lines of the packages
    except UserError as problem:
        return [error("language", str(problem), "let student and teacher be asked alike and end alike")]
    return [warning("language", finding, "") for finding in found]


def _check_server(cfg: DictConfig) -> list[Line]:
    """Lines for the served teacher. Its modules are imported here, because they need torch, which may be broken."""
    from selfdistill.machine.served_teacher import check_server
    from selfdistill.teachers.server import ServerTeacher

    try:
        teacher = doors.built(cfg, "teacher")
    except UserError as problem:
        return [error("teacher", str(problem), "correct the address")]
    if not isinstance(teacher, ServerTeacher):
        return []  # a class of the user's own, which happens to take a `base_url`
    return check_server(teacher, _tokenizer(cfg), cfg.rollout.max_completion_tokens)


def _tokenizer(cfg: DictConfig) -> "PreTrainedTokenizerBase | str":
    """The student's tokenizer, or why it cannot be had."""
    try:
        from transformers import AutoTokenizer

        from selfdistill.models.loading import resolve

        return AutoTokenizer.from_pretrained(
            resolve(cfg.model.name), local_files_only=cfg.model.local_files_only, revision=cfg.model.revision
        )
    except (ImportError, OSError, ValueError) as problem:
        return f"the tokenizer of model.name={cfg.model.name} cannot be loaded ({str(problem).strip().splitlines()[0]})"


def run(cfg: DictConfig) -> None:
    """Print the findings as a table."""
    checked = config.check(cfg, HydraConfig.get().overrides.task)
    lines = diagnose(cfg, checked)
    console = Console(highlight=False, emoji=False)
    console.print(table(lines))
    errors, warnings = (sum(line.state == state for line in lines) for state in ("error", "warning"))
    console.print(f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}.")
    if errors:
        raise SystemExit(1)


def main() -> None:
    sys.argv[1:] = with_server(sys.argv[1:])
    doors.main(CONF / "train.yaml", run, __doc__)


if __name__ == "__main__":
    main()
