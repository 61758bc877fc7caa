"""Which divergence from the teacher q to the student p: its settings and its arithmetic, the one home of both.

One family for all methods, with alpha naming the member (generalised Jensen-Shannon, Agarwal et al. 2024,
arXiv 2306.13649; Hübotter et al. 2026, arXiv 2601.20802):

    alpha = 0        KL(q‖p), forward: the student covers what the teacher says
    alpha = 1        KL(p‖q), reverse: the student keeps to what the teacher holds likely
    0 < alpha < 1    alpha·KL(q‖m) + (1 - alpha)·KL(p‖m),  m = (1 - alpha)·p + alpha·q

**The family jumps at its ends.** For small alpha the third line is about alpha·KL(q‖p), for alpha near 1 about
(1 - alpha)·KL(p‖q): it goes to zero, while alpha = 0 and 1 themselves are full KLs. `jsd_normalize` divides the third
line by alpha·(1 - alpha), which makes the family continuous (and changes the loss's scale: 4 times at 0.5).

The configuration is checked against this class before torch is imported, so only methods of tensors are used here.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from selfdistill.errors import UserError
from selfdistill.limits import check_limits, number

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

# Keeps the logarithm of a mixture finite where both probabilities are 0: the smallest normal float32.
SMALLEST_PROBABILITY = 2.0**-126


@dataclass(frozen=True)
class Divergence:
    """The settings of a divergence, checked once and passed down whole.

    Args:
        alpha: 0 = KL(teacher‖student), 1 = KL(student‖teacher), between = generalised Jensen-Shannon.
        top_k: compares the student's k likeliest tokens only; None compares the whole vocabulary.
        tail: with `top_k`, all other tokens become one bucket, a lower bound of the full divergence; False
            renormalises both distributions over the k tokens and ignores what lies outside.
        temperature: divides the logits of both sides; None leaves the choice to the caller.
        pointwise_clip: upper bound of each vocabulary entry's term (OPSD, arXiv 2601.18734). The clipped sum may be
            negative, and zero for distributions that differ.
        jsd_normalize: divides by alpha·(1 - alpha) where 0 < alpha < 1.

    Raises:
        UserError: alpha outside [0, 1]; temperature or pointwise_clip not above 0; top_k below 1; top_k = 1 without
            a tail, which compares two distributions over one token and is always 0.
    """

    alpha: float = field(default=0.5, metadata=number(0, 1))
    top_k: int | None = field(default=None, metadata=number(1))
    tail: bool = True
    temperature: float | None = field(default=None, metadata=number(above=0))
    pointwise_clip: float | None = field(default=None, metadata=number(above=0))
    jsd_normalize: bool = False

    def __post_init__(self) -> None:
        check_limits(type(self), vars(self), self.written)
        if self.top_k is not None:
            self.check_support(self.top_k)

    def written(self, name: str) -> str:
        """A setting as the person who wrote it knows it."""
        return f"{name}={getattr(self, name)}"

    def check_support(self, size: int) -> None:
        """Raises UserError where a support of so many tokens cannot be compared."""
        if size == 1 and not self.tail:
            raise UserError(
                f"{self.written('top_k')} without a tail compares nothing: write a top_k of at least 2, or tail=true."
            )

    def check_vocabulary(self, size: int) -> None:
        """Raises UserError where `top_k` is more than there are tokens."""
        if self.top_k is not None and self.top_k > size:
            raise UserError(f"{self.written('top_k')} is above the vocabulary of {size} tokens.")

    @property
    def scale(self) -> float:
        """Factor of each term: 1 unless the jump at the ends is normalised away."""
        inside = 0 < self.alpha < 1
        return 1 / (self.alpha * (1 - self.alpha)) if self.jsd_normalize and inside else 1.0

    def between(self, student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
        """The divergence (…,) of log-probabilities (…, V) over the same support, differentiable in the student's."""
        if self.alpha == 0:
            terms = teacher_logps.exp() * (teacher_logps - student_logps)
        elif self.alpha == 1:
            terms = student_logps.exp() * (student_logps - teacher_logps)
        else:
            mixture = (student_logps + math.log(1 - self.alpha)).logaddexp(teacher_logps + math.log(self.alpha))
            of_teacher = teacher_logps.exp() * (teacher_logps - mixture)
            of_student = student_logps.exp() * (student_logps - mixture)
            terms = (self.alpha * of_teacher + (1 - self.alpha) * of_student) * self.scale
        if self.pointwise_clip is not None:
            terms = terms.clamp(max=self.pointwise_clip)
        return terms.sum(-1)

    def terms_and_slope_(self, student_logps: Tensor, teacher_logps: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """What `between` sums (n, V), and its derivative in the student's log-probabilities, up to multiples of p.

        A multiple of p drops out of the gradient in the logits, which is slope - p·sum(slope). Overwrites both
        log-probabilities; `student` are the student's probabilities p and stay.
        """
        if self.alpha == 0:
            teacher = teacher_logps.exp()
            terms = teacher_logps.sub_(student_logps).mul_(teacher)
            slope = teacher.neg_()
        elif self.alpha == 1:
            terms = student_logps.sub_(teacher_logps).mul_(student)
            # With a clip the multiple of p that is left out would differ from entry to entry.
            slope = terms if self.pointwise_clip is None else terms + student
        else:
            teacher = teacher_logps.exp()
            mixture_logps = student.lerp(teacher, self.alpha).clamp_(min=SMALLEST_PROBABILITY).log_()
            slope = student_logps.sub_(mixture_logps).mul_(student).mul_((1 - self.alpha) * self.scale)
            of_teacher = teacher_logps.sub_(mixture_logps).mul_(teacher).mul_(self.alpha * self.scale)
            terms = of_teacher.add_(slope)
        if self.pointwise_clip is not None:
            slope = slope.masked_fill(terms > self.pointwise_clip, 0.0)
            terms = terms.clamp(max=self.pointwise_clip)
        return terms, slope
