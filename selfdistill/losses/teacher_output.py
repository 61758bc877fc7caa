"""What a teacher says of tokens, and how far the student is from it.

A local teacher gives hidden states with their head, which is a full distribution. A server gives its likeliest tokens
with their log-probabilities. Both know the divergence from the student's hidden states and the log-probabilities of
the sampled tokens, so nothing that uses them asks which of the two it has. Tokens of teacher and student correspond one
to one: both score the ids that the student sampled.

No tensor of tokens × vocabulary is ever held. Values and gradients are those of projecting all logits and calling
`token_divergence`, within rounding: the arithmetic is in float32 (float64 for float64 inputs) also where hidden states
and heads are bfloat16.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from selfdistill.losses.chunks import ChunkedPass, HeadedStates, softmax_, token_losses
from selfdistill.losses.divergence import Divergence
from selfdistill.losses.head import Head, as_autocast
from selfdistill.losses.materialised import LOG_ZERO, between_supports, padded_support


class TeacherOutput(ABC):
    """What a teacher says of N tokens."""

    @abstractmethod
    def divergence(
        self,
        hidden: Tensor,
        head: Head,
        kind: Divergence,
        *,
        weights: Tensor | None = None,
        chunk_tokens: int | None = None,
    ) -> Tensor:
        """Divergence per token (N,), in nats; differentiable in `hidden` and the head.

        Args:
            hidden, head: the student's; pass only the tokens that count, for N is what is paid for.
            weights: what each value (N,) will be multiplied by before it is summed (up to one common factor), if that
                is known; see `aggregation_weights`. A hint for speed; it doesn't change the values.
            chunk_tokens: tokens whose logits are held at a time; None takes as many as fit in 128 MiB (GPU: 256 MiB).

        Raises:
            ValueError: the settings don't fit the vocabulary or the support; numbers of tokens differ.
        """

    @abstractmethod
    def token_logps(self, ids: Tensor, temperature: float) -> Tensor:
        """The teacher's log-probabilities (N,) of the sampled tokens; not finite where it gives none."""

    def sampled_divergence(
        self,
        hidden: Float[Tensor, "N H"],
        head: Head,
        ids: Int[Tensor, " N"],
        *,
        weights: Float[Tensor, " N"] | None = None,
        chunk_tokens: int | None = None,
    ) -> Float[Tensor, " N"]:
        """log p - log q of the tokens that the student sampled: an unbiased estimate of KL(p‖q), alpha = 1.

        Its gradient is that of `sampled_token_loss`, (log p - log q)·∇log p, which is the estimate of the divergence's
        gradient. Both are 0 where the teacher's log-probability is not finite.

        Args:
            hidden, head, weights, chunk_tokens: as in `divergence`; the temperature is the head's.
            ids: the sampled tokens.
        """
        hidden, theirs = as_autocast(hidden), self.token_logps(ids, head.temperature)
        loss = partial(_of_sampled, ids, theirs)
        head = head.as_autocast()
        return token_losses(hidden, head, ChunkedPass(head.detached(), loss, chunk_tokens), weights)

    @abstractmethod
    def temperature(self, wanted: float) -> float:
        """The temperature at which it can be compared, where `wanted` was asked for."""


@dataclass(frozen=True)
class FullDistribution(HeadedStates, TeacherOutput):
    """A local teacher's hidden states with their head; two sides make the trust-region mixture of `mix_logits`."""

    def temperature(self, wanted: float) -> float:
        return wanted

    def token_logps(self, ids: Int[Tensor, " N"], temperature: float) -> Float[Tensor, " N"]:
        with torch.no_grad():
            states = self._at(temperature)
            chosen = states.logits_at(slice(None), ids[:, None]).squeeze(-1)
            return chosen - states.logsumexp()

    def divergence(
        self,
        hidden: Float[Tensor, "N H"],
        head: Head,
        kind: Divergence,
        *,
        weights: Float[Tensor, " N"] | None = None,
        chunk_tokens: int | None = None,
    ) -> Float[Tensor, " N"]:
        """A head that needs no gradient costs no product.

        One that does (full training; the same tensor may be the embedding and the teacher's head) is served in the same
        pass when the values are later summed with `weights`, or with equal weights; with any other weights the result
        is as exact, but the backward pass projects everything once more.
        """
        temperature = 1.0 if kind.temperature is None else kind.temperature
        head = head.at(temperature).as_autocast()
        hidden, teacher = as_autocast(hidden), self._at(temperature)
        if any(len(states) != len(hidden) for states, _ in teacher.sides):
            raise ValueError(f"{len(hidden)} tokens of the student, {len(teacher.sides[0][0])} of the teacher")
        # Models of one family share a tokenizer and pad their heads to different sizes: the padding is left out.
        size = min(len(other.weight) for other in (head, *(other for _, other in teacher.sides)))
        head = head.narrowed(size)
        teacher = HeadedStates([(states, other.narrowed(size)) for states, other in teacher.sides], teacher.coef)
        kind.check_vocabulary(size)
        if kind.top_k is None:
            loss = partial(_over_vocabulary, kind)
            chunked = ChunkedPass(head.detached(), loss, chunk_tokens, teacher, tensors=5)
        else:
            loss = partial(_over_top_k, kind, kind.top_k, teacher, teacher.logsumexp())
            chunked = ChunkedPass(head.detached(), loss, chunk_tokens)
        return token_losses(hidden, head, chunked, weights)

    def _at(self, temperature: float) -> HeadedStates:
        sides = [(as_autocast(h).detach(), head.at(temperature).as_autocast().detached()) for h, head in self.sides]
        return HeadedStates(sides, self.coef)


@dataclass(frozen=True)
class TopTokens(TeacherOutput):
    """A served teacher's log-probabilities of N sampled tokens and of the K likeliest, at temperature 1.

    They are over the whole vocabulary, in nats, and not renormalised. Padding is any id of the vocabulary with a
    log-probability of minus infinity.

    Attributes:
        sampled_logps: (N,) of the sampled tokens, which need not be among the likeliest; may be -inf.
        ids, logps: (N, K) of the likeliest tokens, likeliest first.
    """

    sampled_logps: Float[Tensor, " N"]
    ids: Int[Tensor, "N K"]
    logps: Float[Tensor, "N K"]

    @classmethod
    def empty(cls, k: int) -> "TopTokens":
        """For no tokens at all."""
        return cls(torch.zeros(0), torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k))

    @classmethod
    def concatenated(cls, rows: Sequence["TopTokens"], keep: Sequence[Bool[Tensor, " _"]]) -> "TopTokens":
        """The kept tokens of several rows, one after the other.

        Args:
            rows: of any lengths and any K. To the widest K, narrower ones are padded.
            keep: a mask for each row, as long as the row or longer; its end is then padding and not read.
        """
        width = max((row.ids.size(1) for row in rows), default=1)
        empty = cls.empty(width)
        parts = [(empty.sampled_logps, empty.ids, empty.logps)]
        for row, mask in zip(rows, keep, strict=True):
            mask, missing = mask[: len(row.sampled_logps)], (0, width - row.ids.size(1))
            ids, logps = pad(row.ids[mask], missing), pad(row.logps[mask], missing, value=-torch.inf)
            parts.append((row.sampled_logps[mask], ids, logps))
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def to(self, device: torch.device) -> "TopTokens":
        """The same numbers on another device."""
        return TopTokens(self.sampled_logps.to(device), self.ids.to(device), self.logps.to(device))

    def temperature(self, wanted: float) -> float:
        return 1.0

    def token_logps(self, ids: Int[Tensor, " N"], temperature: float) -> Float[Tensor, " N"]:
        return self.sampled_logps

    def divergence(
        self,
        hidden: Float[Tensor, "N H"],
        head: Head,
        kind: Divergence,
        *,
        weights: Float[Tensor, " N"] | None = None,
        chunk_tokens: int | None = None,
    ) -> Float[Tensor, " N"]:
        """`support_divergence` over the teacher's likeliest tokens; `top_k` is not read, for the teacher chose them.

        The temperature divides the student's logits only; the teacher's were divided where they were computed.
        """
        kind.check_support(self.ids.size(-1))
        hidden = as_autocast(hidden)
        head = head.at(1.0 if kind.temperature is None else kind.temperature).as_autocast()
        chunked = ChunkedPass(head.detached(), partial(_over_support, kind, self), chunk_tokens)
        return token_losses(hidden, head, chunked, weights)


def chunked_token_divergence(
    student_hidden: Float[Tensor, "N Hs"],
    teacher_hidden: Float[Tensor, "N Ht"],
    student_head: Float[Tensor, "V Hs"] | Head,
    teacher_head: Float[Tensor, "V Ht"] | Head,
    *,
    alpha: float,
    top_k: int | None = None,
    tail: bool = True,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    pointwise_clip: float | None = None,
    jsd_normalize: bool = False,
    weights: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """`token_divergence` of head(hidden), per token, in nats: `FullDistribution.divergence` as one function.

    Args:
        student_hidden, teacher_hidden: of the tokens that count.
        student_head, teacher_head: the weights, or a `Head` where logits have a bias, a scale or a soft cap.
        alpha, top_k, tail, temperature, pointwise_clip, jsd_normalize: see `Divergence`.
        chunk_tokens, weights: see `TeacherOutput.divergence`.

    Raises:
        ValueError: see `Divergence`; top_k above the vocabulary; chunk_tokens below 1; vocabularies or numbers of
            tokens that differ.
    """
    kind = Divergence(alpha, top_k, tail, temperature, pointwise_clip, jsd_normalize)
    student, teacher = (x if isinstance(x, Head) else Head(x) for x in (student_head, teacher_head))
    if len(student.weight) != len(teacher.weight):
        raise ValueError(
            f"vocabulary of {len(student.weight)} in the student's head, {len(teacher.weight)} in the teacher's"
        )
    output = FullDistribution([(teacher_hidden, teacher)])
    return output.divergence(student_hidden, student, kind, weights=weights, chunk_tokens=chunk_tokens)


def token_logps(
    hidden: Float[Tensor, "N H"],
    head: Head,
    ids: Int[Tensor, " N"],
    *,
    weights: Float[Tensor, " N"] | None = None,
    chunk_tokens: int | None = None,
) -> Float[Tensor, " N"]:
    """log p(ids) of the student, differentiable: what cross-entropy and `importance_weight` are made from."""
    hidden, head = as_autocast(hidden), head.as_autocast()
    return token_losses(hidden, head, ChunkedPass(head.detached(), partial(_of_ids, ids), chunk_tokens), weights)


def _of_ids(ids: Tensor, logits: Tensor, _: Tensor | None, rows: slice, wants_gradient: bool) -> Tensor:
    chosen = logits.gather(-1, ids[rows, None])
    chosen.sub_(softmax_(logits, out=logits))
    if wants_gradient:
        _to_logits_(logits, ids[rows, None], torch.ones_like(chosen))
    return chosen.squeeze(-1)


def _of_sampled(
    ids: Tensor, teacher_logps: Tensor, logits: Tensor, _: Tensor | None, rows: slice, wants_gradient: bool
) -> Tensor:
    theirs = teacher_logps[rows, None]
    log_ratio = logits.gather(-1, ids[rows, None]).sub_(softmax_(logits, out=logits)).sub_(theirs)
    log_ratio.masked_fill_(~theirs.isfinite(), 0.0)
    if wants_gradient:
        _to_logits_(logits, ids[rows, None], log_ratio)
    return log_ratio.squeeze(-1)


def _over_vocabulary(
    kind: Divergence, student: Tensor, teacher: Tensor | None, rows: slice, wants_gradient: bool
) -> Tensor:
    """With d the derivative of the value in log p, the gradient in the logits is d - p·sum(d). In place throughout."""
    assert teacher is not None
    # A bias of minus infinity forbids tokens; the clamp keeps infinities out of the differences of such entries.
    student_logps = torch.log_softmax(student, dim=-1, out=student).clamp_(min=LOG_ZERO)
    teacher_logps = torch.log_softmax(teacher, dim=-1, out=teacher).clamp_(min=LOG_ZERO)
    probabilities = student_logps.exp()
    terms, slope = kind.terms_and_slope_(student_logps, teacher_logps, probabilities)
    values = terms.sum(-1)
    if wants_gradient:
        torch.addcmul(slope, probabilities, slope.sum(-1, keepdim=True), value=-1, out=student)
    return values


def _over_top_k(
    kind: Divergence,
    top_k: int,
    teacher: HeadedStates,
    teacher_normaliser: Tensor,
    student: Tensor,
    _: Tensor | None,
    rows: slice,
    wants_gradient: bool,
) -> Tensor:
    """Over the student's k likeliest tokens. Only k numbers of a row need care, so autograd takes these."""
    top, support = _largest(student, top_k)
    normaliser = softmax_(student, out=student, largest=(top[:, :1], support[:, :1]))
    student_logps = top.sub_(normaliser).clamp_(min=LOG_ZERO)
    teacher_logps = teacher.logits_at(rows, support).sub_(teacher_normaliser[rows, None]).clamp_(min=LOG_ZERO)
    values, slope = _value_and_slope(kind, student_logps, teacher_logps)
    if wants_gradient:
        _to_logits_(student, support, slope)
    return values


def _over_support(
    kind: Divergence, teacher: TopTokens, logits: Tensor, _: Tensor | None, rows: slice, wants_gradient: bool
) -> Tensor:
    """Over the tokens that the teacher chose."""
    ids = teacher.ids[rows]
    chosen = logits.gather(-1, ids)
    student_logps = chosen.sub_(softmax_(logits, out=logits))
    student_logps, teacher_logps = padded_support(student_logps, teacher.logps[rows])
    values, slope = _value_and_slope(kind, student_logps, teacher_logps)
    if wants_gradient:
        _to_logits_(logits, ids, slope)
    return values


def _value_and_slope(kind: Divergence, student_logps: Tensor, teacher_logps: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence over a small support (n, k), and its derivative in the student's log-probabilities."""
    with torch.enable_grad():
        student_logps.requires_grad_()
        values = between_supports(kind, student_logps, teacher_logps)
        (slope,) = torch.autograd.grad(values.sum(), student_logps)
    return values.detach(), slope


def _to_logits_(probabilities: Tensor, support: Tensor, slope: Tensor) -> None:
    """From d value / d log p on a support to d value / d logits, over the probabilities in place."""
    probabilities.mul_(-slope.sum(-1, keepdim=True)).scatter_add_(-1, support, slope)


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest of each row, largest first; as `topk`, in a fraction of its time.

    The columns are dealt into n groups. At most k groups can hold one of the k largest: those with the k largest
    maxima. So a pass for the maxima and two small top-k do.
    """
    rows, vocabulary = logits.shape
    depth = math.isqrt(vocabulary // k) // 2
    if depth < 2:
        return logits.topk(k, dim=-1)
    groups = vocabulary // depth
    dealt = logits[:, : groups * depth].unflatten(-1, (depth, groups))
    best = dealt.amax(1).topk(k, dim=-1, sorted=False).indices
    columns = (best[:, None, :] + groups * torch.arange(depth, device=logits.device)[:, None]).flatten(1)
    rest = torch.arange(groups * depth, vocabulary, device=logits.device).expand(rows, -1)
    columns = torch.cat([columns, rest], dim=-1)
    values, picked = logits.gather(-1, columns).topk(k, dim=-1)
    return values, columns.gather(-1, picked)
