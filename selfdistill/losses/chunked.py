"""The divergences of `divergence.py` from hidden states, without a tensor of tokens × vocabulary ever being held.

Same values and gradients as projecting all logits and calling `token_divergence`, within rounding: the arithmetic is
in float32 (float64 for float64 inputs) also where hidden states and heads are bfloat16. Pass only the tokens that
count: select by the mask before, N is what is paid for.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdistill.losses.divergence import LOG_ZERO, Divergence, support_divergence
from selfdistill.losses.projection import Head, Sweep, Teacher, softmax_, token_losses

Real = float | int


def chunked_token_divergence(
    student_hidden: Float[Tensor, "N Hs"],
    teacher_hidden: Float[Tensor, "N Ht"],
    student_head: Float[Tensor, "V Hs"],
    teacher_head: Float[Tensor, "V Ht"],
    *,
    alpha: Real,
    top_k: int | None = None,
    tail: bool = True,
    temperature: Real = 1.0,
    chunk_tokens: int | None = None,
    pointwise_clip: Real | None = None,
    jsd_normalize: bool = False,
    weights: Float[Tensor, "N"] | None = None,
    student_bias: Float[Tensor, "V"] | None = None,
    teacher_bias: Float[Tensor, "V"] | None = None,
    logit_scale: Real | tuple[Real, Real] = 1.0,
    soft_cap: Real | tuple[Real | None, Real | None] | None = None,
    mixture: tuple[Float[Tensor, "N Hm"], Float[Tensor, "V Hm"], Real] | None = None,
) -> Float[Tensor, "N"]:
    """`token_divergence` of head(hidden), per token, in nats. Differentiable in student_hidden, _head and _bias.

    A head that needs no gradient costs no product. One that does (full training; the same tensor may be the embedding
    and the teacher's head) is served in the same pass when the values are later summed with `weights`, or with equal
    weights; with any other weights the result is as exact, but the backward pass projects everything once more.

    Args:
        alpha, top_k, tail, temperature, pointwise_clip, jsd_normalize: as in `token_divergence`.
        chunk_tokens: tokens whose logits are held at a time; None: as many as fit in 128 MiB (GPU: 256 MiB).
        weights: what each value will be multiplied by before it is summed (up to one common factor), if that is known;
            see `aggregation_weights`. A hint for speed; it doesn't change the values returned.
        logit_scale: factor of the logits, of both models or as (student, teacher).
        soft_cap: cap·tanh(logits / cap) after the scale, before the temperature; of both or as (student, teacher).
        mixture: (hidden, head, coef) of a second teacher, mixed by `mix_logits`: the trust-region teacher has the
            reference as teacher and the student under the teacher's prompt here. Shares the teacher's bias, scale and
            cap.

    Raises:
        ValueError: see `Divergence`; top_k above the vocabulary; chunk_tokens below 1; vocabularies or numbers of
            tokens that differ.
    """
    kind = Divergence(alpha, top_k, tail, temperature, pointwise_clip, jsd_normalize)
    student_hidden, teacher_hidden, student_head, teacher_head = (
        _as_autocast(x) for x in (student_hidden, teacher_hidden, student_head, teacher_head)
    )
    scales = logit_scale if isinstance(logit_scale, tuple) else (logit_scale, logit_scale)
    caps = soft_cap if isinstance(soft_cap, tuple) else (soft_cap, soft_cap)
    head = _head(student_head, student_bias, scales[0], caps[0], temperature)
    sides = [(teacher_hidden, teacher_head), *([tuple(map(_as_autocast, mixture[:2]))] if mixture else [])]
    teacher = Teacher(
        tuple((h.detach(), _head(w, teacher_bias, scales[1], caps[1], temperature)) for h, w in sides),
        coef=mixture[2] if mixture else 0.0,
    )
    _check(student_hidden, student_head, chunk_tokens, teacher)
    kind.check_vocabulary(len(student_head))
    if top_k is None:
        sweep = Sweep(head, partial(_over_vocabulary, kind), chunk_tokens, teacher, tensors=5)
    else:
        sweep = Sweep(head, partial(_over_top_k, kind, teacher, teacher.logsumexp()), chunk_tokens)
    return token_losses(student_hidden, student_head, student_bias, sweep, weights)


def chunked_support_divergence(
    student_hidden: Float[Tensor, "N H"],
    student_head: Float[Tensor, "V H"],
    support_ids: Int[Tensor, "N K"],
    teacher_logps: Float[Tensor, "N K"],
    *,
    alpha: Real,
    tail: bool = True,
    temperature: Real = 1.0,
    chunk_tokens: int | None = None,
    pointwise_clip: Real | None = None,
    jsd_normalize: bool = False,
    weights: Float[Tensor, "N"] | None = None,
    student_bias: Float[Tensor, "V"] | None = None,
    logit_scale: Real = 1.0,
    soft_cap: Real | None = None,
) -> Float[Tensor, "N"]:
    """`support_divergence` of head(hidden) from a served teacher's log-probabilities of `support_ids`.

    Padding: any id of the vocabulary with a teacher log-probability of minus infinity. `temperature` divides the
    student's logits only; the teacher's were divided where they were computed. The rest: `chunked_token_divergence`.
    """
    Divergence(alpha, None, tail, temperature, pointwise_clip, jsd_normalize).check_support(support_ids.shape[-1])
    divergence = partial(
        support_divergence, alpha=alpha, tail=tail, pointwise_clip=pointwise_clip, jsd_normalize=jsd_normalize
    )
    student_hidden, student_head = _as_autocast(student_hidden), _as_autocast(student_head)
    head = _head(student_head, student_bias, logit_scale, soft_cap, temperature)
    _check(student_hidden, student_head, chunk_tokens)

    def loss(logits: Tensor, _: Tensor | None, rows: slice, wants_gradient: bool) -> Tensor:
        ids = support_ids[rows]
        chosen = logits.gather(-1, ids)
        normaliser = softmax_(logits, out=logits)
        values, slope = _value_and_slope(divergence, chosen.sub_(normaliser), teacher_logps[rows])
        if wants_gradient:
            _to_logits(logits, ids, slope)
        return values

    sweep = Sweep(head, loss, chunk_tokens)
    return token_losses(student_hidden, student_head, student_bias, sweep, weights)


def chunked_token_logps(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"],
    ids: Int[Tensor, "N"],
    *,
    temperature: Real = 1.0,
    chunk_tokens: int | None = None,
    weights: Float[Tensor, "N"] | None = None,
    bias: Float[Tensor, "V"] | None = None,
    logit_scale: Real = 1.0,
    soft_cap: Real | None = None,
) -> Float[Tensor, "N"]:
    """log p(ids) of head(hidden), differentiable: what `sampled_token_loss` and `importance_weight` are made from."""
    hidden, head = _as_autocast(hidden), _as_autocast(head)
    _check(hidden, head, chunk_tokens)

    def loss(logits: Tensor, _: Tensor | None, rows: slice, wants_gradient: bool) -> Tensor:
        chosen = logits.gather(-1, ids[rows, None])
        chosen.sub_(softmax_(logits, out=logits))
        if wants_gradient:
            _to_logits(logits, ids[rows, None], torch.ones_like(chosen))
        return chosen.squeeze(-1)

    sweep = Sweep(_head(head, bias, logit_scale, soft_cap, temperature), loss, chunk_tokens)
    return token_losses(hidden, head, bias, sweep, weights)


def _as_autocast(tensor: Tensor) -> Tensor:
    """What a linear layer would do on a GPU: float32 products there would take many times as long."""
    on = tensor.is_cuda and torch.is_autocast_enabled("cuda")
    return tensor.to(torch.get_autocast_dtype("cuda")) if on else tensor


def _head(weight: Tensor, bias: Tensor | None, scale: Real, cap: Real | None, temperature: Real) -> Head:
    bias = None if bias is None else bias.detach()
    return Head(weight.detach(), bias, float(scale), None if cap is None else float(cap), float(temperature))


def _check(hidden: Tensor, head: Tensor, chunk_tokens: int | None, teacher: Teacher | None = None) -> None:
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    for other_hidden, other in teacher.sides if teacher else ():
        if len(other.weight) != len(head):
            raise ValueError(f"vocabulary of {len(head)} in the student's head, {len(other.weight)} in the teacher's")
        if len(other_hidden) != len(hidden):
            raise ValueError(f"{len(hidden)} tokens of the student, {len(other_hidden)} of the teacher")


def _value_and_slope(
    divergence: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """A divergence over a small support (n, k), and its derivative in the student's log-probabilities."""
    with torch.enable_grad():
        student.requires_grad_()
        values = divergence(student, teacher)
        (slope,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), slope


def _to_logits(probabilities: Tensor, support: Tensor, slope: Tensor) -> None:
    """From d value / d log p on a support to d value / d logits, over the probabilities in place."""
    probabilities.mul_(-slope.sum(-1, keepdim=True)).scatter_add_(-1, support, slope)


def _over_vocabulary(
    kind: Divergence, student: Tensor, teacher: Tensor | None, rows: slice, wants_gradient: bool
) -> Tensor:
    """With d the derivative of the value in log p, the gradient in the logits is d - p·sum(d). In place throughout."""
    assert teacher is not None
    # Tokens that a bias forbids count for nothing, without infinities in the differences.
    log_p = torch.log_softmax(student, dim=-1, out=student).clamp_(min=LOG_ZERO)
    log_q = torch.log_softmax(teacher, dim=-1, out=teacher).clamp_(min=LOG_ZERO)
    p = log_p.exp()
    if kind.alpha == 0:
        q = log_q.exp()
        terms, slope = log_q.sub_(log_p).mul_(q), q.neg_()
    elif kind.alpha == 1:
        # d is terms + p, but multiples of p drop out of the gradient as long as nothing is clipped.
        terms = log_p.sub_(log_q).mul_(p)
        slope = terms if kind.pointwise_clip is None else terms + p
    else:
        q = log_q.exp()
        # Where both are 0, the smallest number keeps the logarithm finite.
        log_m = torch.lerp(p, q, kind.alpha).clamp_(min=torch.finfo(p.dtype).tiny).log_()
        slope = log_p.sub_(log_m).mul_(p).mul_((1 - kind.alpha) * kind.scale)
        terms = log_q.sub_(log_m).mul_(q).mul_(kind.alpha * kind.scale).add_(slope)
    if kind.pointwise_clip is not None:
        slope = slope.masked_fill(terms > kind.pointwise_clip, 0.0)
        terms = terms.clamp(max=kind.pointwise_clip)
    values = terms.sum(-1)
    if wants_gradient:
        torch.addcmul(slope, p, slope.sum(-1, keepdim=True), value=-1, out=student)
    return values


def _over_top_k(
    kind: Divergence,
    teacher: Teacher,
    teacher_normaliser: Tensor,
    student: Tensor,
    _: Tensor | None,
    rows: slice,
    wants_gradient: bool,
) -> Tensor:
    """Over the student's k likeliest, where only k numbers of a row need care: autograd takes these."""
    assert kind.top_k is not None
    top, support = _largest(student, kind.top_k)
    normaliser = softmax_(student, out=student, largest=(top[:, :1], support[:, :1]))
    student_logps = top.sub_(normaliser).clamp_(min=LOG_ZERO)
    teacher_logps = teacher.logits_at(rows, support).sub_(teacher_normaliser[rows, None]).clamp_(min=LOG_ZERO)
    values, slope = _value_and_slope(kind.between_supports, student_logps, teacher_logps)
    if wants_gradient:
        _to_logits(student, support, slope)
    return values


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
