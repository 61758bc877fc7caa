"""A teacher in the same process: a choice of weights and a choice of context."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from selfdistill.errors import UserError
from selfdistill.losses.teacher_output import FullDistribution
from selfdistill.models.agreement import can_be_asked, check_head
from selfdistill.models.structure import completion_hidden, evaluating, head_of
from selfdistill.teachers.context import Context, NoContext
from selfdistill.teachers.interface import BaseTeacher, TeacherRequest
from selfdistill.teachers.language import Speaker
from selfdistill.teachers.weights import Base, Weights


class Teacher(BaseTeacher):
    """A local teacher: whose weights score the student's completions, and what they see beyond the prompt.

    Args:
        weights: one of `selfdistill.teachers.weights`; the frozen start by default.
        context: one of `selfdistill.teachers.context`; the student's own prompt by default.
        chat_template_kwargs: what the chat template is rendered with for the teacher; None for the student's.
    """

    def __init__(
        self,
        weights: Weights | None = None,
        context: Context | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.weights = weights or Base()
        self.context = context or NoContext()
        self.chat_template_kwargs = chat_template_kwargs

    def __str__(self) -> str:
        return f"{type(self.weights).__name__}, sees {type(self.context).__name__}"

    def attach(self, student: nn.Module, tokenizer: PreTrainedTokenizerBase, *, sharded: bool) -> None:
        if sharded and self.weights.keeps_copy and not isinstance(student, FSDPModule):
            raise UserError(
                f"teacher.weights={type(self.weights).__name__} keeps a copy of the trained parameters, and FSDP1 "
                "holds them in buffers of its own, where they cannot be exchanged. Train with FSDP2 "
                "(fsdp_version: 2), data parallelism or ZeRO-2, or take teacher/weights=live, model or a server."
            )
        self.weights.attach(student)
        self.weights.check_vocabulary(tokenizer)
        for module in () if self.weights.keeps_copy else self.weights.views():
            if module is not None and can_be_asked(module):  # a model of its own; the student has been asked before
                check_head(module, tokenizer, "The teacher")

    def compare(self, student: Speaker) -> list[str]:
        return [*super().compare(student), *self.weights.compare(student)]

    def generating(self) -> AbstractContextManager[None]:
        return self.weights.generating()

    def say(self, request: TeacherRequest, student: nn.Module) -> FullDistribution:
        """The teacher's passes over the rows with a signal, in evaluation mode and without gradient."""
        sides = []
        for module in self.weights.views():
            model = student if module is None else module
            with evaluating(model):
                hidden = completion_hidden(
                    model, request.prompt_ids, request.prompt_mask, request.completion_ids, request.completion_mask
                )
            # Detached inside the loop: the student's parameters are about to be put back into the module.
            head = head_of(model).detached()
            if isinstance(model, FSDPModule) and self.weights.keeps_copy:
                head = head.copied()  # the student's will be gathered into the same memory
            sides.append((hidden[request.keep], head))
        return FullDistribution(sides, coef=self.weights.mix_coef)

    def before_rollouts(self, step: int) -> None:
        if self.weights.cadence == "rollout" and step:
            self.weights.update(step)

    def after_step(self, step: int) -> None:
        if self.weights.cadence == "step":
            self.weights.update(step)

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.weights.load_state_dict(state)
