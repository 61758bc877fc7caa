import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from selfdistill.losses import (
    Divergence,
    FullDistribution,
    Head,
    TopTokens,
    chunks,
    mix_logits,
    sampled_token_loss,
    support_divergence,
    token_divergence,
    token_logps,
)
from selfdistill.losses import (
    head as heads,
)
from selfdistill.losses.chunks import ChunkedPass
from selfdistill.losses.teacher_output import _largest

N, H, V = 11, 6, 203
OPTIONS = [{}, {"top_k": 4}, {"top_k": 4, "tail": False}, {"top_k": V}]
ALPHAS = [0.0, 0.3, 0.5, 1.0]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a small vocabulary takes several, and the last ones are not full."""
    monkeypatch.setattr(heads, "TILE_COLUMNS", 64)
    monkeypatch.setattr(chunks, "TILE_TOKENS", 5)


def both(value):
    return value if isinstance(value, tuple) else (value, value)


def chunked_token_divergence(
    student, teacher, student_head, teacher_head, *, student_bias=None, teacher_bias=None, logit_scale=1.0,
    soft_cap=None, mixture=None, weights=None, chunk_tokens=None, temperature=1.0, **kind,
):  # fmt: skip
    """With heads that have a bias, a scale and a soft cap, and a second teacher."""
    scales, caps = both(logit_scale), both(soft_cap)
    head = Head(student_head, student_bias, scales[0], caps[0])
    sides = [(teacher, Head(teacher_head, teacher_bias, scales[1], caps[1]))]
    if mixture is not None:
        sides.append((mixture[0], Head(mixture[1], teacher_bias, scales[1], caps[1])))
    output = FullDistribution(sides, coef=mixture[2] if mixture is not None else 0.0)
    kind = Divergence(temperature=temperature, **kind)
    return output.divergence(student, head, kind, weights=weights, chunk_tokens=chunk_tokens)


class Side:
    """Hidden states and a head of one model."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64, hidden: int = H, vocabulary: int = V) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(N, hidden, generator=generator, dtype=torch.float64).to(dtype)
        self.head = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype)
        self.bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)

    def trained(self) -> "Side":
        for tensor in (self.hidden, self.head, self.bias):
            tensor.requires_grad_()
        return self


def gradients(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors, materialize_grads=True)


def assert_same(ours: Tensor, theirs: Tensor, weights: Tensor, *tensors: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, **tolerance)
    for a, b in zip(
        gradients((ours * weights).sum(), *tensors), gradients((theirs * weights).sum(), *tensors), strict=True
    ):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "extra", [{}, {"temperature": 0.7}, {"jsd_normalize": True}, {"pointwise_clip": 0.01}, {"chunk_tokens": 4}]
)
def test_same_as_materialised(alpha, options, extra):
    student, teacher = Side(0).trained(), Side(1)
    ours = chunked_token_divergence(
        student.hidden, teacher.hidden, student.head, teacher.head, alpha=alpha, **options, **extra
    )
    options = {**options, **{key: value for key, value in extra.items() if key != "chunk_tokens"}}
    theirs = token_divergence(student.hidden @ student.head.T, teacher.hidden @ teacher.head.T, alpha=alpha, **options)
    assert_same(ours, theirs, torch.arange(N) - 3.0, student.hidden, student.head, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", OPTIONS[:2])
@pytest.mark.parametrize(("cap", "scale"), [(None, 0.25), (3.0, 1.0), ((None, 2.0), (2.0, 0.5)), ((2.0, None), 0.5)])
def test_bias_scale_and_soft_cap(alpha, options, cap, scale):
    student, teacher = Side(0).trained(), Side(1)
    caps = cap if isinstance(cap, tuple) else (cap, cap)
    scales = scale if isinstance(scale, tuple) else (scale, scale)
    logits = [
        s * torch.nn.functional.linear(x.hidden, x.head, x.bias)
        for x, s in zip((student, teacher), scales, strict=True)
    ]
    logits = [x if c is None else c * torch.tanh(x / c) for x, c in zip(logits, caps, strict=True)]
    theirs = token_divergence(*logits, alpha=alpha, temperature=1.3, **options)
    ours = chunked_token_divergence(
        student.hidden, teacher.hidden, student.head, teacher.head, alpha=alpha, temperature=1.3, chunk_tokens=5,
        student_bias=student.bias, teacher_bias=teacher.bias, logit_scale=scale, soft_cap=cap, **options,
    )  # fmt: skip
    assert_same(ours, theirs, torch.rand(N).double(), student.hidden, student.head, student.bias, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    teacher = Side(1, vocabulary=9)
    options = {**options, "top_k": min(options["top_k"], 9)} if "top_k" in options else options

    def function(hidden, head, bias):
        return chunked_token_divergence(
            hidden, teacher.hidden, head, teacher.head, alpha=0.3, student_bias=bias, chunk_tokens=4, soft_cap=4.0,
            temperature=0.8, **options,
        )  # fmt: skip

    student = Side(0, vocabulary=9).trained()
    assert torch.autograd.gradcheck(function, (student.hidden, student.head, student.bias))


def test_tied_head():
    """One tensor as embedding, student's head and teacher's head: its gradient is the sum of what reaches it."""
    weight = Side(0).head.requires_grad_()
    ids = torch.arange(N) % 7

    def loss(divergence) -> Tensor:
        return divergence(weight[ids] * 1.5, weight[ids].detach() * 0.5).mean()

    ours = loss(lambda s, t: chunked_token_divergence(s, t, weight, weight, alpha=0.5))
    theirs = loss(lambda s, t: token_divergence(s @ weight.T, t @ weight.detach().T, alpha=0.5))
    torch.testing.assert_close(gradients(ours, weight), gradients(theirs, weight))


def test_models_of_different_width():
    student, teacher = Side(0).trained(), Side(1, hidden=9)
    ours = chunked_token_divergence(student.hidden, teacher.hidden, student.head, teacher.head, alpha=0.0)
    theirs = token_divergence(student.hidden @ student.head.T, teacher.hidden @ teacher.head.T, alpha=0.0)
    assert_same(ours, theirs, torch.ones(N).double(), student.hidden, student.head)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_trust_region_mixture(alpha, cap):
    student, reference, live = Side(0).trained(), Side(1), Side(2, hidden=4)
    logits = [x.hidden @ x.head.T for x in (student, reference, live)]
    logits = [x if cap is None else cap * torch.tanh(x / cap) for x in logits]
    theirs = token_divergence(logits[0], mix_logits(logits[1], logits[2], 0.3), alpha=alpha, temperature=1.4)
    ours = chunked_token_divergence(
        student.hidden, reference.hidden, student.head, reference.head, alpha=alpha, temperature=1.4, soft_cap=cap,
        mixture=(live.hidden, live.head, 0.3),
    )  # fmt: skip
    assert_same(ours, theirs, torch.ones(N).double(), student.hidden, student.head)


@pytest.mark.parametrize("weights", [None, torch.arange(N) / 7.0, torch.zeros(N)])
@pytest.mark.parametrize("later", ["as announced", "otherwise"])
def test_weights_are_a_hint_and_never_wrong(weights, later):
    student, teacher = Side(0).trained(), Side(1)
    ours = chunked_token_divergence(
        student.hidden, teacher.hidden, student.head, teacher.head, alpha=0.5, student_bias=student.bias,
        weights=weights if weights is None else weights.double(),
    )  # fmt: skip
    logits = student.hidden @ student.head.T + student.bias
    theirs = token_divergence(logits, teacher.hidden @ teacher.head.T, alpha=0.5)
    used = torch.ones(N) if weights is None else weights
    used = -0.37 * used.double() if later == "as announced" else torch.arange(N).double() ** 2
    assert_same(ours, theirs, used, student.hidden, student.head, student.bias)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", OPTIONS[:3])
def test_bfloat16_is_summed_in_float32(alpha, options):
    """Against float64 arithmetic on the same bfloat16 numbers: values float32-exact, gradients rounded once."""
    student, teacher = Side(0, torch.bfloat16).trained(), Side(1, torch.bfloat16)
    ours = chunked_token_divergence(
        student.hidden, teacher.hidden, student.head, teacher.head, alpha=alpha, chunk_tokens=4, **options
    )
    logits = [x.hidden.double() @ x.head.double().T for x in (student, teacher)]
    theirs = token_divergence(*logits, alpha=alpha, **options)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-5)
    for mine, exact in zip(
        gradients(ours.sum(), student.hidden, student.head), gradients(theirs.sum(), student.hidden, student.head),
        strict=True,
    ):  # fmt: skip
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, exact, rtol=2**-7, atol=1e-5)


def test_mixed_precision():
    student, teacher = Side(0).trained(), Side(1, torch.bfloat16)
    student.head = student.head.detach().bfloat16().requires_grad_()
    hidden = student.hidden.detach().float().requires_grad_()
    ours = chunked_token_divergence(hidden, teacher.hidden, student.head, teacher.head, alpha=0.5)
    logits = [hidden.double() @ student.head.double().T, teacher.hidden.double() @ teacher.head.double().T]
    theirs = token_divergence(*logits, alpha=0.5).float()
    assert_same(ours, theirs, torch.ones(N), hidden, student.head, rtol=2**-7, atol=1e-5)


def test_autocast_leaves_the_arithmetic_alone():
    student, teacher = Side(0, torch.float32).trained(), Side(1, torch.float32)
    arguments = (student.hidden, teacher.hidden, student.head, teacher.head)
    plain = chunked_token_divergence(*arguments, alpha=1.0, top_k=4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = chunked_token_divergence(*arguments, alpha=1.0, top_k=4)
        # Not equal weights: the backward pass projects again.
        inside = gradients((cast * torch.arange(N)).sum(), student.hidden, student.head)
    assert torch.equal(plain, cast)
    for a, b in zip(inside, gradients((plain * torch.arange(N)).sum(), student.hidden, student.head), strict=True):
        torch.testing.assert_close(a, b)


# ---- what it costs


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_iter(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("options", OPTIONS[:3])
@pytest.mark.parametrize("trained", [False, True])
def test_no_tensor_of_tokens_times_vocabulary(options, trained):
    student, teacher = Side(0), Side(1)
    student.hidden.requires_grad_()
    student.head.requires_grad_(trained)
    with LargestTensor() as largest:
        values = chunked_token_divergence(
            student.hidden, teacher.hidden, student.head, teacher.head, alpha=0.5, chunk_tokens=2, **options
        )
        (values * torch.arange(N)).sum().backward()
    assert largest.numel == V * H, "the head itself, or logits of two tokens, are the largest"


def products(student: Side, weights: Tensor | None = None, later: Tensor | None = None, **options) -> float:
    """Matrix products of tokens × hidden × vocabulary that value and gradient take."""
    teacher = Side(1)
    with FlopCounterMode(display=False) as counter:
        values = chunked_token_divergence(
            student.hidden, teacher.hidden, student.head, teacher.head, alpha=0.5, weights=weights, **options
        )
        if values.requires_grad:
            (values if later is None else values * later).sum().backward()
    return counter.get_total_flops() / (2 * N * H * V)


def test_products():
    frozen = Side(0)
    assert products(frozen) == 2, "nothing to train: two projections"
    frozen.hidden.requires_grad_()
    assert products(frozen) == 3, "a frozen head costs no product"
    with torch.no_grad():
        assert products(Side(0).trained()) == 2
    assert products(Side(0).trained()) == 4
    weights = torch.arange(N).double()
    assert products(Side(0).trained(), weights, weights) == 4
    assert products(Side(0).trained(), None, weights) == 7, "not announced: projections and head's gradient once more"
    # Over the top k the teacher is not projected again, and costs k dot products a token beside its projection.
    assert 3 < products(frozen, top_k=4) < 3.1
    assert 6 < products(Side(0).trained(), None, weights, top_k=4) < 6.1


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", OPTIONS[:3])
def test_tokens_that_a_bias_forbids_count_for_nothing(alpha, options):
    student, teacher = Side(0).trained(), Side(1)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[-70:] = -math.inf  # more than the last tile
    ours = chunked_token_divergence(
        student.hidden, teacher.hidden, student.head, teacher.head, alpha=alpha, chunk_tokens=4, student_bias=bias,
        teacher_bias=bias, **options,
    )  # fmt: skip
    theirs = token_divergence(
        student.hidden @ student.head.T + bias, teacher.hidden @ teacher.head.T + bias, alpha=alpha, **options
    )
    assert_same(ours, theirs, torch.ones_like(ours), student.hidden, student.head)


def test_default_chunks_are_of_equal_size():
    sweep = ChunkedPass(Head(torch.empty(0, 1)), lambda *_: torch.empty(0), None)
    assert sweep._sizes(616, 151_936, gpu=False)[0] == 206
    assert sweep._sizes(616, 151_936, gpu=True)[0] == 308
    assert sweep._sizes(5, 100, gpu=False)[0] == 5
    assert sweep._sizes(1, 2**30, gpu=False) == (1, torch.get_num_threads())


# ---- edges


@pytest.mark.parametrize("options", OPTIONS[:3])
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(options, tokens):
    student, teacher = Side(0).trained(), Side(1)
    values = chunked_token_divergence(
        student.hidden[:tokens], teacher.hidden[:tokens], student.head, teacher.head, alpha=0.5, **options
    )
    assert values.shape == (tokens,)
    values.sum().backward()
    assert student.head.grad is not None and student.head.grad.any() == bool(tokens)
    assert student.hidden.grad is not None and student.hidden.grad.any() == bool(tokens)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", OPTIONS[:3])
def test_extreme_logits_stay_finite(alpha, options):
    """Logits of some thousands: probabilities of exactly 0 and 1 in float32, on both sides."""
    student, teacher = Side(0, torch.float32), Side(1, torch.float32)
    hidden = (1000 * student.hidden).requires_grad_()
    values = chunked_token_divergence(hidden, 1000 * teacher.hidden, student.head, teacher.head, alpha=alpha, **options)
    expected = token_divergence(hidden @ student.head.T, 1000 * teacher.hidden @ teacher.head.T, alpha=alpha, **options)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    values.sum().backward()
    assert hidden.grad.isfinite().all()


def test_equal_models_give_zero_and_no_gradient():
    student = Side(0).trained()
    for alpha in ALPHAS:
        values = chunked_token_divergence(
            student.hidden, student.hidden, student.head, student.head, alpha=alpha, top_k=5
        )
        torch.testing.assert_close(values, torch.zeros(N).double())
        for gradient in gradients(values.sum(), student.hidden, student.head):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 2.0}, "alpha"),
        ({"top_k": V + 1}, "vocabulary"),
        ({"top_k": 1, "tail": False}, "without a tail"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    student = Side(0)
    with pytest.raises(ValueError, match=message):
        chunked_token_divergence(
            student.hidden, student.hidden, student.head, student.head, **{"alpha": 0.5, **options}
        )


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("vocabulary", [20, 203, 4099])
def test_largest(k, vocabulary):
    logits = torch.randn(7, vocabulary, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    logits[0] = torch.arange(vocabulary)
    logits[1] = -torch.arange(vocabulary)
    values, indices = _largest(logits, k)
    expected = logits.topk(k)
    assert torch.equal(values, expected.values) and torch.equal(indices, expected.indices)


# ---- a served teacher, and log-probabilities


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", [True, False])
def test_served_teacher(alpha, tail):
    student, teacher = Side(0).trained(), Side(1)
    teacher_logps, ids = (teacher.hidden @ teacher.head.T).log_softmax(-1).topk(6)
    teacher_logps[::2, -1] = -math.inf
    output = TopTokens(torch.zeros(N), ids, teacher_logps)
    kind = Divergence(alpha, tail=tail, temperature=1.2)
    ours = output.divergence(student.hidden, Head(student.head, student.bias), kind, chunk_tokens=4)
    logps = ((student.hidden @ student.head.T + student.bias) / 1.2).log_softmax(-1).gather(-1, ids)
    theirs = support_divergence(logps, teacher_logps, alpha=alpha, tail=tail)
    assert_same(ours, theirs, torch.arange(N).double(), student.hidden, student.head, student.bias)


def test_token_logps():
    student = Side(0).trained()
    ids = torch.arange(N) * 7
    head = Head(student.head, student.bias, soft_cap=3.0, temperature=0.9)
    ours = token_logps(student.hidden, head, ids, chunk_tokens=3)
    logits = 3 * torch.tanh((student.hidden @ student.head.T + student.bias) / 3) / 0.9
    theirs = logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    assert_same(ours, theirs, torch.arange(N).double(), student.hidden, student.head, student.bias)


def test_a_teachers_log_probabilities():
    """Those of the sampled tokens under a full distribution, and under a mixture of two."""
    first, second = Side(1), Side(2, hidden=4)
    ids = torch.arange(N) * 7
    logits = [x.hidden @ x.head.T for x in (first, second)]
    for sides, mixed in (([first], logits[0]), ([first, second], mix_logits(*logits, 0.3))):
        output = FullDistribution([(x.hidden, Head(x.head)) for x in sides], coef=0.3)
        expected = (mixed / 0.7).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
        torch.testing.assert_close(output.token_logps(ids, 0.7), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampled_tokens_estimate_in_one_sweep(temperature, monkeypatch):
    """The gradient is that of `sampled_token_loss`, and the head's needs no second pass when weights are known."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    teacher, ids, weights = torch.randn(N, V), torch.randint(V, (N,)), torch.rand(N)
    theirs = (teacher / temperature).log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
    theirs[2] = -torch.inf
    said, swept = TopTokens(theirs, ids[:, None], theirs[:, None]), []
    run = ChunkedPass.run
    monkeypatch.setattr(ChunkedPass, "run", lambda *given, **options: swept.append(1) or run(*given, **options))
    found = said.sampled_divergence(hidden, Head(weight, temperature=temperature), ids, weights=weights, chunk_tokens=4)
    ours = gradients((found * weights).sum(), hidden, weight)
    assert len(swept) == 1
    logps = (hidden @ weight.T / temperature).log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(found, (logps - theirs).masked_fill(~theirs.isfinite(), 0.0))
    expected = gradients((sampled_token_loss(logps, theirs) * weights).sum(), hidden, weight)
    torch.testing.assert_close(ours, expected)
