"""Who teaches, and what the teacher sees. Names are looked up when they are used: contexts are light to import."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdistill.teachers.interface import BaseTeacher
    from selfdistill.teachers.local import Teacher

__all__ = ["BaseTeacher", "Teacher"]


def __getattr__(name: str) -> Any:
    if name == "Teacher":
        from selfdistill.teachers.local import Teacher

        return Teacher
    if name == "BaseTeacher":
        from selfdistill.teachers.interface import BaseTeacher

        return BaseTeacher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
