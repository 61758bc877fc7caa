import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdistill.rewards.batching import plan

PROMPTS = [[1] * 10] * 4 + [[2] * 10] * 4 + [[3] * 12] * 4


@given(
    prompts=st.lists(st.integers(0, 3), min_size=0, max_size=25),
    counts=st.lists(st.integers(0, 9), min_size=25, max_size=25),
    budget=st.integers(1, 200),
    shared=st.none() | st.integers(1, 200),
)
@settings(max_examples=100, deadline=None)
def test_every_row_with_something_to_score_comes_once_and_budgets_hold(prompts, counts, budget, shared):
    rows = [[kind] * (3 + 2 * kind) for kind in prompts]
    counts = counts[: len(rows)]
    batches = plan(rows, counts, budget, shared)
    assert sorted(row for batch in batches for row in batch.rows) == [r for r, count in enumerate(counts) if count]
    for batch in batches:
        longest, prompt = max(counts[row] for row in batch.rows), max(len(rows[row]) for row in batch.rows)
        if batch.prompts is None:
            assert batch.padded_tokens <= max(budget, prompt + longest - 1)
        else:
            assert len(batch.rows) == 1 or len(batch.rows) * (prompt + longest) <= shared
            for row, place in zip(batch.rows, batch.prompts, strict=True):
                assert all(
                    (rows[row] == rows[other]) == (place == p)
                    for other, p in zip(batch.rows, batch.prompts, strict=True)
                )


def test_a_group_shares_its_prompt_where_that_pays():
    (batch,) = plan(PROMPTS, [3] * 12, 1000, 1000)
    assert batch.prompts == [0] * 4 + [1] * 4 + [2] * 4
    assert batch.padded_tokens == 3 * 11 + 12 * 3
    (alone,) = plan(PROMPTS, [3] * 12, 1000, None)
    assert alone.prompts is None
    assert alone.padded_tokens == 12 * 14


@pytest.mark.parametrize(("prompts", "count"), [([[n, n] * 5 for n in range(12)], 3), (PROMPTS, 200), ([[1]] * 12, 3)])
def test_no_sharing_without_equal_prompts_or_beside_long_completions_or_without_a_prefix(prompts, count):
    assert all(batch.prompts is None for batch in plan(prompts, [count] * 12, 10**6, 10**6))
