"""Who teaches, and what the teacher sees. Names are looked up when they are used: contexts are light to import."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdistill.teachers.interface import BaseTeacher
    from selfdistill.teachers.local import Teacher

__all__ = ["BaseTeacher", "Teacher"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("selfdistill.teachers.local"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
