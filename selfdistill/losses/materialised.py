"""Losses per token on logits or log-probabilities that are at hand: the definitions that the others are held against.

No gradient ever reaches the teacher. Half-precision inputs are widened to float32 first.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from selfdistill.losses.divergence import Divergence

# Stands for log 0: exp gives exactly 0 in every precision, and sums and differences of a few stay finite in float32.
LOG_ZERO = -1e30
# The captured mass is kept this far below 1 (in log), so that the tail bucket has a logarithm. As both references do.
MAX_LOG_MASS = -1e-7


def between_supports(
    kind: Divergence, student_logps: Float[Tensor, "*tokens K"], teacher_logps: Float[Tensor, "*tokens K"]
) -> Float[Tensor, "*tokens"]:
    """Divergence of log-probabilities over a part of the vocabulary, completed by a tail bucket or renormalised."""
    return kind.between(_complete(student_logps, kind.tail), _complete(teacher_logps, kind.tail))


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
    alpha: float,
    top_k: int | None = None,
    tail: bool = True,
    temperature: float = 1.0,
    pointwise_clip: float | None = None,
    jsd_normalize: bool = False,
) -> Float[Tensor, "*tokens"]:
    """Divergence of each token's next-token distributions, in nats; formula and the jump at the ends: see `divergence`.

    The reference that `chunked_token_divergence` is held against, and the one to use where logits are at hand. Logits
    may be log-probabilities. Entries of minus infinity have probability 0.

    Args:
        alpha, top_k, tail, temperature, pointwise_clip, jsd_normalize: see `Divergence`.

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
    return between_supports(kind, student.gather(-1, support), teacher.gather(-1, support))


def support_divergence(
    student_logps_on_support: Float[Tensor, "*tokens K"],
    teacher_logps: Float[Tensor, "*tokens K"],
    *,
    alpha: float,
    tail: bool = True,
    pointwise_clip: float | None = None,
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
    return between_supports(kind, *padded_support(student_logps_on_support, teacher_logps))


def padded_support(student_logps: Tensor, teacher_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides in float32 or wider, with probability 0 where the teacher's is not finite, which is padding."""
    student_logps, teacher_logps = widen(student_logps), widen(teacher_logps.detach())
    padding = ~teacher_logps.isfinite()
    student_logps = student_logps.clamp(min=LOG_ZERO).masked_fill(padding, LOG_ZERO)
    return student_logps, teacher_logps.masked_fill(padding, LOG_ZERO)


def mix_logits(
    ref_logits: Float[Tensor, "*tokens V"], student_logits: Float[Tensor, "*tokens V"], coef: float
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
    student_logps: Float[Tensor, "*tokens"], old_logps: Float[Tensor, "*tokens"], clip: float
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
