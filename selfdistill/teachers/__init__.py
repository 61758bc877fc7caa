"""Who teaches: a teacher is a choice of weights and a choice of context."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdistill.teachers.weights import Weights


class Teacher:
    """A local teacher: whose weights score the student's completions, and what they see beyond the prompt.

    Args:
        weights: one of `selfdistill.teachers.weights`; the frozen start by default.
        context: one of `selfdistill.teachers.context`; the student's own prompt by default.
    """

    served = False

    def __init__(self, weights: "Weights | None" = None, context: Any = None) -> None:
        # Imported here so that the configuration's check may look at this class without waiting for torch.
        from selfdistill.teachers.context import NoContext
        from selfdistill.teachers.weights import Base

        self.weights = weights or Base()
        self.context = context or NoContext()


__all__ = ["Teacher"]
