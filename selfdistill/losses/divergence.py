"""Divergences per token between a student p and a teacher q, on materialised logits.

One family for all methods, with alpha naming the member (generalised Jensen-Shannon, Agarwal et al. 2024,
arXiv 2306.13649; Hübotter et al. 2026, arXiv 2601.20802):

    alpha = 0        KL(q‖p), forward: the student covers what the teacher says
    alpha = 1        KL(p‖q), reverse: the student keeps to what the teacher holds likely
    0 < alpha < 1    alpha·KL(q‖m) + (1 - alpha)·KL(p‖m),  m = (1 - alpha)·p + alpha·q

**The family jumps at its ends.** For small alpha the third line is about alpha·KL(q‖p), for alpha near 1 about
(1 - alpha)·KL(p‖q): it goes to zero, while alpha = 0 and 1 themselves are full KLs. `jsd_normalize` divides the third
line by alpha·(1 - alpha), which makes the family continuous (and changes the loss's scale: 4 times at 0.5).

No gradient ever reaches the teacher. Half-precision inputs are widened to float32 first.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Stands for log 0: exp gives exactly 0 in every precision, and sums and differences of a few stay finite in float32.
LOG_ZERO = -1e30
# The captured mass is kept this far below 1 (in log), so that the tail bucket has a logarithm. As both references do.
MAX_LOG_MASS = -1e-7


@dataclass(frozen=True)
class Divergence:
    """Which divergence; the arguments of `token_divergence`, checked once.

    Raises:
        ValueError: alpha outside [0, 1]; temperature or pointwise_clip not above 0; top_k below 1; top_k = 1 without
            a tail, which compares two distributions over one token and is always 0.
    """

    alpha: float | int
    top_k: int | None = None
    tail: bool = True
    temperature: float | int = 1.0
    pointwise_clip: float | int | None = None
    jsd_normalize: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.pointwise_clip is not None and not self.pointwise_clip > 0:
            raise ValueError(f"pointwise_clip must be above 0, got {self.pointwise_clip}")
        if self.top_k is not None:
            self.check_support(self.top_k)

    def check_support(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"top_k must be at least 1, got {size}")
        if size == 1 and not self.tail:
            raise ValueError("top_k=1 without a tail is always 0: set tail=True or a larger top_k")

    def check_vocabulary(self, size: int) -> None:
        if self.top_k is not None and self.top_k > size:
            raise ValueError(f"top_k={self.top_k} is above the vocabulary of {size}")

    @property
    def scale(self) -> float:
        """Factor of each term: 1 unless the jump at the ends is normalised away."""
        inside = 0 < self.alpha < 1
        return 1 / (self.alpha * (1 - self.alpha)) if self.jsd_normalize and inside else 1.0

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of log-probabilities over the same support; sums over the last dimension."""
        if self.alpha == 0:
            terms = teacher.exp() * (teacher - student)
        elif self.alpha == 1:
            terms = student.exp() * (student - teacher)
        else:
            mixture = torch.logaddexp(student + math.log(1 - self.alpha), teacher + math.log(self.alpha))
            of_teacher = teacher.exp() * (teacher - mixture)
            of_student = student.exp() * (student - mixture)
            terms = (self.alpha * of_teacher + (1 - self.alpha) * of_student) * self.scale
        if self.pointwise_clip is not None:
            terms = terms.clamp(max=self.pointwise_clip)
        return terms.sum(-1)

    def between_supports(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of log-probabilities over a part of the vocabulary, completed by a tail bucket or renormalised."""
        return self.between(_complete(student, self.tail), _complete(teacher, self.tail))


def _complete(logps: Tensor, tail: bool) -> Tensor:
    mass = logps.logsumexp(-1, keepdim=True)
    if not tail:
        return logps - mass
    rest = torch.log(-torch.expm1(mass.clamp(max=MAX_LOG_MASS)))
    return torch.cat([logps, rest], dim=-1)


def widen(tensor: Tensor) -> Tensor:
    """float32 for half precision, else unchanged."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def token_divergence(
    student_logits: Float[Tensor, "*tokens V"],
    teacher_logits: Float[Tensor, "*tokens V"],
    *,
    alpha: float | int,
    top_k: int | None = None,
    tail: bool = True,
    temperature: float | int = 1.0,
    pointwise_clip: float | int | None = None,
    jsd_normalize: bool = False,
) -> Float[Tensor, "*tokens"]:
    """Divergence of each token's next-token distributions, in nats; formula and the jump at the ends: see the module.

    The reference that `chunked_token_divergence` is held against, and the one to use where logits are at hand. Logits
    may be log-probabilities. Entries of minus infinity have probability 0.

    Args:
        alpha: 0 forward KL, 1 reverse KL, between: generalised Jensen-Shannon.
        top_k: compare only the student's k likeliest tokens; None: the whole vocabulary.
        tail: with top_k, all other tokens become one bucket, a lower bound of the full divergence; False: both
            distributions are renormalised over the k tokens and what lies outside is ignored.
        temperature: divides both logits.
        pointwise_clip: upper bound of each vocabulary entry's term (OPSD, arXiv 2601.18734). The clipped sum may be
            negative, and zero for distributions that differ.
        jsd_normalize: divide by alpha·(1 - alpha) where 0 < alpha < 1.

    Raises:
        ValueError: see `Divergence`; top_k above the vocabulary; shapes that differ.
    """
    kind = Divergence(alpha, top_k, tail, temperature, pointwise_clip, jsd_normalize)
    kind.check_vocabulary(student_logits.shape[-1])
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}")
    student = torch.log_softmax(widen(student_logits) / temperature, dim=-1).clamp(min=LOG_ZERO)
    teacher = torch.log_softmax(widen(teacher_logits.detach()) / temperature, dim=-1).clamp(min=LOG_ZERO)
    if top_k is None:
        return kind.between(student, teacher)
    support = student.detach().topk(top_k, dim=-1).indices
    return kind.between_supports(student.gather(-1, support), teacher.gather(-1, support))


def support_divergence(
    student_logps_on_support: Float[Tensor, "*tokens K"],
    teacher_logps: Float[Tensor, "*tokens K"],
    *,
    alpha: float | int,
    tail: bool = True,
    pointwise_clip: float | int | None = None,
    jsd_normalize: bool = False,
) -> Float[Tensor, "*tokens"]:
    """Divergence over a support chosen from outside: the K tokens whose log-probabilities a served teacher returns.

    Both arguments are true log-probabilities over the whole vocabulary, of the same K token ids. Entries that are not
    finite in the teacher are padding: they count for neither side. A position of nothing but padding gives 0.

    Args:
        tail, pointwise_clip, jsd_normalize: as in `token_divergence`.

    Raises:
        ValueError: see `Divergence`; one token without a tail; shapes that differ.
    """
    kind = Divergence(alpha, None, tail, 1.0, pointwise_clip, jsd_normalize)
    kind.check_support(teacher_logps.shape[-1])
    if student_logps_on_support.shape != teacher_logps.shape:
        raise ValueError(f"student {tuple(student_logps_on_support.shape)}, teacher {tuple(teacher_logps.shape)}")
    student, teacher = widen(student_logps_on_support), widen(teacher_logps.detach())
    padding = ~teacher.isfinite()
    student = student.clamp(min=LOG_ZERO).masked_fill(padding, LOG_ZERO)
    return kind.between_supports(student, teacher.masked_fill(padding, LOG_ZERO))


def mix_logits(
    ref_logits: Float[Tensor, "*tokens V"], student_logits: Float[Tensor, "*tokens V"], coef: float | int
) -> Float[Tensor, "*tokens V"]:
    """The trust-region teacher: log q = (1 - coef)·log q_ref + coef·log q_student, up to a constant (arXiv 2601.20802).

    Both logits are of the teacher's prompt. No gradient passes.

    Raises:
        ValueError: coef outside [0, 1].
    """
    if not 0 <= coef <= 1:
        raise ValueError(f"coef must be in [0, 1], got {coef}")
    return torch.lerp(widen(ref_logits.detach()), widen(student_logits.detach()), coef)


def sampled_token_loss(
    student_logps: Float[Tensor, "*tokens"], teacher_logps: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """sg(log p - log q)·log p of the tokens that the student sampled.

    Its gradient is an unbiased estimate of that of KL(p‖q), alpha = 1, for tokens sampled from p. **Its value means
    nothing**, not even its sign: log the divergence itself beside it. Where the teacher's log-probability is not
    finite (padding), the loss and its gradient are 0.
    """
    student, teacher = widen(student_logps), widen(teacher_logps.detach())
    ratio = (student.detach() - teacher).masked_fill(~teacher.isfinite(), 0.0)
    return ratio * student


def importance_weight(
    student_logps: Float[Tensor, "*tokens"], old_logps: Float[Tensor, "*tokens"], clip: float | int
) -> Float[Tensor, "*tokens"]:
    """min(p / p_old, clip) per token, detached: corrects for tokens that another policy (or another engine) sampled.

    The log-ratio is limited to ±20 before exp.

    Raises:
        ValueError: clip not above 0.
    """
    if not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip}")
    log_ratio = widen(student_logps.detach()) - widen(old_logps.detach())
    return log_ratio.clamp(min=-20.0, max=20.0).exp().clamp(max=clip)
