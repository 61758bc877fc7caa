"""One program for language models that learn from themselves.

    from selfdistill import Distillation, SelfDistillTrainer, Teacher

Nothing heavy is imported until one of these names is used.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Distillation": "selfdistill.config.settings",
    "RolloutSource": "selfdistill.config.settings",
    "SelfDistillConfig": "selfdistill.training.arguments",
    "SelfDistillTrainer": "selfdistill.training.trainer",
    "Teacher": "selfdistill.teachers",
    "UserError": "selfdistill.errors",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'selfdistill' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
