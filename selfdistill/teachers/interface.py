"""What the trainer asks of a teacher, local or served; a new kind of teacher is a class with this base.

Student and teacher tokens correspond one to one: the teacher scores the very ids that the student sampled, behind a
prompt of its own. A teacher with another tokenizer would need an alignment of two token sequences; today it is the
identity.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from selfdistill.errors import UserError
from selfdistill.losses.teacher_output import TeacherOutput, TopTokens
from selfdistill.rollout import Prompt, Rollouts
from selfdistill.teachers.context import Context
from selfdistill.teachers.language import Speaker, asked_alike, unread_kwargs

# The key of a micro-batch under which its `TeacherRequest` is kept.
REQUEST = "teacher_request"


@dataclass
class TeacherRequest:
    """What a teacher is asked about one micro-batch: its R rows with a signal.

    Attributes:
        prompt_ids, prompt_mask: what the teacher sees, padded on the left.
        completion_ids, completion_mask: what the student sampled, padded on the right.
        keep: the distilled tokens, about which the teacher is asked.
        answer: what a served teacher will say of each row with a distilled token, once it was asked by `prepare`.
    """

    prompt_ids: Int[Tensor, "R P"]
    prompt_mask: Int[Tensor, "R P"]
    completion_ids: Int[Tensor, "R T"]
    completion_mask: Int[Tensor, "R T"]
    keep: Bool[Tensor, "R T"]
    answer: "Future[list[TopTokens]] | None" = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "TeacherRequest":
        """The rows of a micro-batch whose `distill_mask` has a token; all of them where none has.

        With several processes the others may be waiting for this one to make a teacher's pass too.
        """
        rows = inputs["distill_mask"].any(dim=1)
        if not rows.any():
            rows = torch.ones_like(rows)
        width = max(int(inputs["completion_mask"][rows].sum(dim=1).max()), 1)
        completion = (inputs[name][rows][:, :width] for name in ("completion_ids", "completion_mask", "distill_mask"))
        return cls(inputs["teacher_prompt_ids"][rows], inputs["teacher_prompt_mask"][rows], *completion)

    def sent(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and completion of each row as token ids, without padding."""
        prompts = _unpadded(self.prompt_ids, self.prompt_mask)
        return list(zip(prompts, _unpadded(self.completion_ids, self.completion_mask), strict=True))


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]


class BaseTeacher:
    """A teacher that shows the student's own prompt, keeps nothing and follows nothing.

    Attributes:
        context: what the teacher sees beyond the prompt.
        context_tokens: the longest prompt and completion together that it takes, where there is a limit.
        chat_template_kwargs: what the chat template is rendered with for the teacher, such as
            {"enable_thinking": True}; None for what it is rendered with for the student.
        served: whether it gives log-probabilities of its likeliest tokens at temperature 1 alone, as servers do; the
            configuration is checked against it.
    """

    served = False
    context: Context
    chat_template_kwargs: Mapping[str, Any] | None = None

    @property
    def context_tokens(self) -> int | None:
        return None

    def __str__(self) -> str:
        return f"{type(self).__name__}, sees {type(self.context).__name__}"

    # ---- before training ----

    def check(self, tokenizer: PreTrainedTokenizerBase, *, vocabulary_size: int | None = None) -> list[str]:
        """Whether it can teach this student, before anything is trained; what was found, in lines for the screen.

        Args:
            vocabulary_size: the width of the student's logits.

        Raises:
            UserError: it cannot.
        """
        return []

    def check_columns(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """Raises UserError where the data (its columns beside `prompt`) lack what the teacher is shown."""
        self.context.check(columns)

    def check_length(self, longest_tokens: int) -> None:
        """Raises UserError where prompt and completion of so many tokens together are too long."""

    def attach(self, student: nn.Module, tokenizer: PreTrainedTokenizerBase, *, sharded: bool) -> None:
        """Called once, with the unwrapped student.

        Args:
            sharded: whether FSDP or ZeRO-3 shards the student's parameters.

        Raises:
            UserError: it cannot teach this student.
        """

    def template_kwargs(self, of_student: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the chat template is rendered with for the teacher, given what it is rendered with for the student."""
        return of_student if self.chat_template_kwargs is None else self.chat_template_kwargs

    def compare(self, student: Speaker) -> list[str]:
        """Called once it is attached: how it is asked and ends otherwise than the student, each with what to set.

        Raises:
            UserError: they have no end in common, so that nothing good can be learned.
        """
        asked = replace(student, template_kwargs=self.template_kwargs(student.template_kwargs))
        if not student.conversational or asked == student:
            return []
        same = "For the same leave teacher.chat_template_kwargs at model.chat_template_kwargs."
        unread = unread_kwargs(asked, "teacher.chat_template_kwargs")
        return [*unread, *asked_alike(student, asked.asked, same)]

    def generating(self) -> AbstractContextManager[None]:
        """The student's module samples as the teacher inside.

        Raises:
            UserError: it cannot sample within the run.
        """
        raise UserError("rollout.from_teacher=true needs a local teacher, for example teacher=demonstration.")

    # ---- during training ----

    def prompts(self, rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> list[Prompt | None]:
        """What the teacher is shown for each rollout of whole groups; None where there is nothing to learn from."""
        return self.context.prompts(rollouts, tokenizer)

    def prepare(self, requests: Sequence[TeacherRequest]) -> None:
        """Called with the micro-batches to come, in the order in which they are learned from."""

    def say(self, request: TeacherRequest, student: nn.Module) -> TeacherOutput:
        """What the teacher says of the distilled tokens, in row order.

        Args:
            student: as it is trained, with its distributed wrapper.
        """
        raise NotImplementedError

    def before_rollouts(self, step: int) -> None:
        """Called before completions are sampled, with the number of optimizer steps done."""

    def after_step(self, step: int) -> None:
        """Called after every optimizer step, with the number of steps done."""

    # ---- checkpoints and the end ----

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must keep, by name."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state_dict` gave. Raises UserError where it does not fit."""

    def close(self) -> None:
        """Called when the run is over."""
