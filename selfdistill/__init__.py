"""One program for language models that learn from themselves.

    from selfdistill import Distillation, SelfDistillTrainer, Teacher

Nothing heavy is imported until one of these names is used.
"""

from importlib import import_module
from logging import getLogger
from typing import Any

__version__ = "0.1.0"

# On a CPU with AVX512-BF16, bitsandbytes warns while peft imports it that an optional kernel is missing, and the line
# would stand before every answer of every command. Nothing here uses that kernel; all other records of the logger pass.
getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

_EXPORTS = {
    "Distillation": "selfdistill.config.settings",
    "RolloutSource": "selfdistill.config.settings",
    "SelfDistillConfig": "selfdistill.training.arguments",
    "SelfDistillTrainer": "selfdistill.training.trainer",
    "Teacher": "selfdistill.teachers",
    "UserError": "selfdistill.errors",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'selfdistill' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
