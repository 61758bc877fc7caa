import math

import pytest
import torch

from selfdistill.losses import MODES, aggregate, aggregation_normalizer, aggregation_weights

# Rows of 3, 1, 0 and 2 tokens; the last one carries no signal.
LOSS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 50.0, 50.0], [50.0, 50.0, 50.0], [6.0, 8.0, 50.0]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
ACTIVE = torch.tensor([True, True, True, False])


@pytest.mark.parametrize(
    ("mode", "all_rows", "counting", "not_counting"),
    [
        # mask alone; row 3 inactive but counted; row 3 inactive and not counted
        ("token_mean", 24 / 6, 10 / 6, 10 / 4),
        ("seq_mean_token_mean", (2 + 4 + 7) / 4, 6 / 4, 6 / 3),
        ("seq_mean_token_sum", (6 + 4 + 14) / 4, 10 / 4, 10 / 3),
        ("seq_mean_token_sum_norm", 24 / 3, 10 / 3, 10 / 3),
    ],
)
def test_modes(mode, all_rows, counting, not_counting):
    assert aggregate(LOSS, MASK, mode).item() == pytest.approx(all_rows)
    assert aggregate(LOSS, MASK, mode, row_active=ACTIVE).item() == pytest.approx(counting)
    ours = aggregate(LOSS, MASK, mode, row_active=ACTIVE, count_inactive_rows=False)
    assert ours.item() == pytest.approx(not_counting)


def test_rows_without_tokens_are_inactive_by_themselves():
    assert aggregate(LOSS, MASK, "seq_mean_token_sum", count_inactive_rows=False).item() == pytest.approx(24 / 3)


def test_constant_length():
    ours = aggregate(LOSS, MASK, "seq_mean_token_sum_norm", max_completion_tokens=48, normalizer=4)
    assert ours.item() == pytest.approx(24 / 48 / 4)
    with pytest.raises(ValueError, match="max_completion_tokens"):
        aggregate(LOSS, MASK, "seq_mean_token_sum_norm", max_completion_tokens=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [True, False])
@pytest.mark.parametrize("active", [None, ACTIVE])
def test_a_window_of_parts_is_one_batch(mode, count, active):
    options = {"count_inactive_rows": count, "max_completion_tokens": 10}
    parts = [slice(0, 1), slice(1, 4)]
    rows = [None if active is None else active[part] for part in parts]
    total = sum(
        aggregation_normalizer(MASK[part], mode, row_active=row, count_inactive_rows=count)
        for part, row in zip(parts, rows, strict=True)
    )
    ours = sum(
        aggregate(LOSS[part], MASK[part], mode, row_active=row, normalizer=total, **options)
        for part, row in zip(parts, rows, strict=True)
    )
    whole = aggregation_normalizer(MASK, mode, row_active=active, count_inactive_rows=count)
    torch.testing.assert_close(ours, aggregate(LOSS, MASK, mode, row_active=active, normalizer=whole, **options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalizer", [None, 0, torch.tensor(0.0)])
def test_nothing_active_is_zero_on_the_graph(mode, normalizer):
    loss = LOSS.clone().requires_grad_()
    for mask, active in [(torch.zeros_like(MASK), None), (MASK, torch.zeros(4))]:
        for count in (True, False):
            total = aggregate(loss, mask, mode, row_active=active, count_inactive_rows=count, normalizer=normalizer)
            assert total.item() == 0.0
            (gradient,) = torch.autograd.grad(total, loss)
            assert not gradient.any()


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch(mode):
    loss = torch.zeros(0, 3, requires_grad=True)
    total = aggregate(loss, torch.zeros(0, 3), mode)
    total.backward()
    assert total.item() == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_masked_tokens_may_hold_anything(mode):
    dirty = torch.where(MASK.bool(), LOSS, torch.tensor(math.nan)).requires_grad_()
    total = aggregate(dirty, MASK, mode)
    torch.testing.assert_close(total, aggregate(LOSS, MASK, mode))
    total.backward()
    assert dirty.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
def test_weights_are_the_aggregation(mode, kind):
    options = {"row_active": ACTIVE, "count_inactive_rows": False, "max_completion_tokens": 7}
    weights = aggregation_weights(MASK.to(kind), mode, **options)
    torch.testing.assert_close((LOSS * weights).sum(), aggregate(LOSS, MASK, mode, **options))


def test_double_precision_is_kept():
    loss = torch.ones(3, 3, dtype=torch.float64) / 3
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    assert aggregate(loss, mask, "seq_mean_token_mean").item() == pytest.approx(1 / 3, rel=1e-14)


def test_half_precision_is_summed_in_float32():
    loss = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    total = aggregate(loss, torch.ones(1, 4096), "seq_mean_token_sum")
    assert total.dtype == torch.float32 and total.item() == 4096.0


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="token_mean, seq_mean_token_mean"):
        aggregate(LOSS, MASK, "mean")
    with pytest.raises(ValueError, match="unknown"):
        aggregate(LOSS, MASK, "mean", normalizer=3.0)
