import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdistill.losses import (
    importance_weight,
    mix_logits,
    sampled_token_loss,
    support_divergence,
    token_divergence,
)

ALPHAS = [0.0, 0.05, 0.3, 0.5, 0.95, 1.0]


def by_hand(p: list[float], q: list[float], alpha: float, clip: float = math.inf) -> float:
    """The definition, entry by entry, in plain Python."""

    def kl_term(a: float, b: float) -> float:
        return a * math.log(a / b) if a > 0 else 0.0

    total = 0.0
    for a, b in zip(p, q, strict=True):
        if alpha == 0:
            term = kl_term(b, a)
        elif alpha == 1:
            term = kl_term(a, b)
        else:
            m = (1 - alpha) * a + alpha * b
            term = alpha * kl_term(b, m) + (1 - alpha) * kl_term(a, m)
        total += min(term, clip)
    return total


def random_logits(*shape: int, seed: int = 0, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def as_lists(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> list[tuple[list, list]]:
    p, q = (torch.softmax(x / temperature, -1).tolist() for x in (student, teacher))
    return list(zip(p, q, strict=True))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("clip", [None, 0.02])
def test_full_vocabulary(alpha, temperature, clip):
    student, teacher = random_logits(6, 17)
    values = token_divergence(student, teacher, alpha=alpha, temperature=temperature, pointwise_clip=clip)
    expected = [by_hand(p, q, alpha, clip or math.inf) for p, q in as_lists(student, teacher, temperature)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("k", [2, 5, 16])
def test_top_k(alpha, tail, k):
    student, teacher = random_logits(6, 17, seed=1)
    expected = []
    for p, q in as_lists(student, teacher):
        support = sorted(range(17), key=lambda v: -p[v])[:k]
        p, q = [p[v] for v in support], [q[v] for v in support]
        if tail:
            p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
        else:
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected.append(by_hand(p, q, alpha))
    values = token_divergence(student, teacher, alpha=alpha, top_k=k, tail=tail)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 3, "tail": False}, {"jsd_normalize": True}])
def test_gradient(alpha, options):
    student, teacher = random_logits(3, 7, seed=2, spread=1.0)
    assert torch.autograd.gradcheck(
        lambda x: token_divergence(x, teacher, alpha=alpha, **options), student.requires_grad_()
    )


def test_the_teacher_gets_no_gradient():
    student, teacher = random_logits(3, 7)
    student.requires_grad_()
    teacher.requires_grad_()
    token_divergence(student, teacher, alpha=0.5).sum().backward()
    assert student.grad is not None and teacher.grad is None
    assert not mix_logits(student, teacher, 0.5).requires_grad


def test_directions_are_not_swapped():
    # The student puts mass where the teacher puts none: reverse KL minds, forward KL hardly.
    student = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).clamp(min=1e-9).log()
    teacher = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).clamp(min=1e-9).log()
    forward = token_divergence(student, teacher, alpha=0.0)
    reverse = token_divergence(student, teacher, alpha=1.0)
    assert forward == pytest.approx(math.log(2), abs=1e-6)
    assert reverse > 9


def test_the_family_jumps_at_its_ends_and_normalising_mends_it():
    student, teacher = random_logits(1, 50, seed=3, spread=1.5)

    def at(alpha, **options):
        return token_divergence(student, teacher, alpha=alpha, **options).item()

    assert at(0.001) < 0.01 * at(0.0) and at(0.999) < 0.01 * at(1.0)
    assert at(0.001, jsd_normalize=True) == pytest.approx(at(0.0), rel=0.02)
    assert at(0.999, jsd_normalize=True) == pytest.approx(at(1.0), rel=0.02)
    assert at(0.5, jsd_normalize=True) == pytest.approx(4 * at(0.5))
    assert at(0.0, jsd_normalize=True) == at(0.0) and at(1.0, jsd_normalize=True) == at(1.0)


def test_top_k_of_the_whole_vocabulary_is_the_full_divergence():
    student, teacher = random_logits(4, 12)
    full = token_divergence(student, teacher, alpha=0.3)
    for tail in (True, False):
        torch.testing.assert_close(token_divergence(student, teacher, alpha=0.3, top_k=12, tail=tail), full)


def test_the_tail_is_a_lower_bound():
    student, teacher = random_logits(20, 40)
    for alpha in ALPHAS:
        full = token_divergence(student, teacher, alpha=alpha)
        assert (token_divergence(student, teacher, alpha=alpha, top_k=5) <= full + 1e-12).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_forbidden_tokens_count_for_nothing(alpha):
    """A vocabulary padded with entries of probability 0 gives what it gives unpadded, and finite gradients."""
    student, teacher = random_logits(4, 9)
    padding = torch.full((4, 3), -math.inf, dtype=torch.float64)
    padded = torch.cat([student, padding], -1).requires_grad_()
    values = token_divergence(padded, torch.cat([teacher, padding], -1), alpha=alpha)
    torch.testing.assert_close(values, token_divergence(student, teacher, alpha=alpha))
    values.sum().backward()
    assert padded.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(dtype):
    student, teacher = (x.to(dtype) for x in random_logits(5, 30))
    for options in ({}, {"top_k": 4}):
        values = token_divergence(student, teacher, alpha=0.5, **options)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, token_divergence(student.float(), teacher.float(), alpha=0.5, **options))


def test_shapes():
    for shape in [(7,), (0, 7), (2, 3, 7), (1, 1, 7)]:
        student, teacher = random_logits(*shape)
        assert token_divergence(student, teacher, alpha=0.5).shape == shape[:-1]
        assert token_divergence(student, teacher, alpha=0.5, top_k=2).shape == shape[:-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"alpha": 0.5, "top_k": 0}, "top_k"),
        ({"alpha": 0.5, "top_k": 8}, "vocabulary of 7"),
        ({"alpha": 0.5, "top_k": 1, "tail": False}, "without a tail"),
        ({"alpha": 0.5, "temperature": 0.0}, "temperature"),
        ({"alpha": 0.5, "pointwise_clip": -1.0}, "pointwise_clip"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    student, teacher = random_logits(2, 7)
    with pytest.raises(ValueError, match=message):
        token_divergence(student, teacher, **options)


def test_top_1_with_a_tail_is_allowed():
    student, teacher = random_logits(2, 7)
    assert (token_divergence(student, teacher, alpha=1.0, top_k=1) > 0).all()


# Logits in steps of 1/4, so that two that differ at all differ by more than rounding.
rows = st.lists(st.integers(-40, 40).map(lambda x: x / 4), min_size=6, max_size=6)
alphas = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.01, 0.99))


@settings(max_examples=100, deadline=None)
@given(rows, rows, alphas, st.sampled_from([{}, {"top_k": 3}, {"top_k": 3, "tail": False}, {"jsd_normalize": True}]))
def test_never_negative_and_zero_for_equals(p, q, alpha, options):
    student, teacher = (torch.tensor(x, dtype=torch.float64) for x in (p, q))
    assert token_divergence(student, teacher, alpha=alpha, **options) >= -1e-12
    assert abs(token_divergence(student, student + 3.0, alpha=alpha, **options)) < 1e-12


@settings(max_examples=100, deadline=None)
@given(rows, rows, alphas)
def test_zero_only_for_equals(p, q, alpha):
    student, teacher = (torch.tensor(x, dtype=torch.float64) for x in (p, q))
    same = torch.allclose(student.softmax(-1), teacher.softmax(-1), rtol=1e-3, atol=1e-4)
    assert same or token_divergence(student, teacher, alpha=alpha) > 1e-12


@settings(max_examples=100, deadline=None)
@given(rows, rows, alphas)
def test_exchanging_the_sides_is_exchanging_the_ends(p, q, alpha):
    """D_alpha(p, q) = D_(1 - alpha)(q, p); at 0.5 the divergence is symmetric."""
    student, teacher = (torch.tensor(x, dtype=torch.float64) for x in (p, q))
    there = token_divergence(student, teacher, alpha=alpha)
    back = token_divergence(teacher, student, alpha=1 - alpha)
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12)
    half = token_divergence(student, teacher, alpha=0.5)
    assert half <= math.log(2) + 1e-12


# ---- a served teacher's support


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", [True, False])
def test_support_is_top_k_of_whoever_chose_it(alpha, tail):
    student, teacher = (x.log_softmax(-1) for x in random_logits(5, 20))
    ids = student.topk(4).indices
    values = support_divergence(student.gather(-1, ids), teacher.gather(-1, ids), alpha=alpha, tail=tail)
    torch.testing.assert_close(values, token_divergence(student, teacher, alpha=alpha, top_k=4, tail=tail))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("hole", [-math.inf, math.nan])
def test_padding_in_a_support(alpha, tail, hole):
    student, teacher = (x.log_softmax(-1)[:, :4] for x in random_logits(5, 20))
    expected = support_divergence(student, teacher, alpha=alpha, tail=tail)
    padded = torch.cat([student, student[:, :2]], -1).requires_grad_()
    holes = torch.full((5, 2), hole, dtype=torch.float64)
    values = support_divergence(padded, torch.cat([teacher, holes], -1), alpha=alpha, tail=tail)
    torch.testing.assert_close(values, expected)
    values.sum().backward()
    assert padded.grad.isfinite().all() and not padded.grad[:, 4:].any() and padded.grad[:, :4].any()


@pytest.mark.parametrize("tail", [True, False])
def test_a_position_of_padding_gives_zero_and_no_gradient(tail):
    student = random_logits(2, 4)[0].log_softmax(-1).requires_grad_()
    values = support_divergence(student, torch.full((2, 4), -math.inf, dtype=torch.float64), alpha=0.5, tail=tail)
    values.sum().backward()
    assert not values.any() and not student.grad.any()


def test_a_support_of_one_needs_a_tail():
    logps = torch.tensor([[-1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="without a tail"):
        support_divergence(logps, logps, alpha=0.0, tail=False)


# ---- the small ones


def test_sampled_token_gradient_is_the_reverse_kl_in_expectation():
    student, teacher = random_logits(1, 6)
    student.requires_grad_()
    log_p, log_q = student.log_softmax(-1)[0], teacher.log_softmax(-1)[0]
    expected = (log_p.detach().exp() * sampled_token_loss(log_p, log_q)).sum()
    (ours,) = torch.autograd.grad(expected, student)
    (exact,) = torch.autograd.grad(token_divergence(student, teacher, alpha=1.0).sum(), student)
    torch.testing.assert_close(ours, exact)


def test_sampled_token_without_teacher_has_no_loss():
    student = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = sampled_token_loss(student, torch.tensor([-math.inf, -1.0]))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 2.0] and student.grad.tolist() == [0.0, -1.0]


def test_importance_weight():
    new, old = torch.tensor([-1.0, -1.0, -1.0, -1.0, -90.0]), torch.tensor([-1.0, -2.0, -1.5, -60.0, -1.0])
    weight = importance_weight(new.requires_grad_(), old, 2.0)
    assert not weight.requires_grad
    torch.testing.assert_close(weight, torch.tensor([1.0, 2.0, math.exp(0.5), 2.0, math.exp(-20.0)]))
    assert importance_weight(new, old, 1e30)[3] == pytest.approx(math.exp(20.0))
    with pytest.raises(ValueError, match="clip"):
        importance_weight(new, old, 0.0)


def test_mixture_is_geometric():
    ref, student = random_logits(4, 9)
    q = mix_logits(ref, student, 0.3).softmax(-1)
    product = ref.softmax(-1) ** 0.7 * student.softmax(-1) ** 0.3
    torch.testing.assert_close(q, product / product.sum(-1, keepdim=True))
    assert torch.equal(mix_logits(ref, student, 0), ref) and torch.equal(mix_logits(ref, student, 1), student)
    with pytest.raises(ValueError, match="coef"):
        mix_logits(ref, student, 1.2)
