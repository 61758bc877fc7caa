import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdistill.statistics import completion_metrics, distinct_n, repetition, reward_spread


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),
        ([7] * 13, 0.9),
        ([1, 2] * 6, 7 / 9),
    ],
)
def test_repetition(ids, expected):
    assert repetition(ids) == pytest.approx(expected)


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repetition_counts_positions_that_repeat_an_earlier_4_gram(ids):
    seen, repeats, total = set(), 0, max(len(ids) - 3, 0)
    for start in range(total):
        gram = tuple(ids[start : start + 4])
        repeats += gram in seen
        seen.add(gram)
    assert repetition(ids) == pytest.approx(repeats / total if total else 0.0)


@pytest.mark.parametrize(
    ("completions", "n", "expected"),
    [([], 2, 1.0), ([[1]], 2, 1.0), ([[1, 2, 3]], 2, 1.0), ([[1, 2]] * 4, 2, 0.25), ([[1, 2], [2, 1]], 1, 0.5)],
)
def test_distinct_n(completions, n, expected):
    assert distinct_n(completions, n) == pytest.approx(expected)


def test_reward_spread_is_within_prompts():
    assert reward_spread([0.0, 0.0, 1.0, 1.0], 2) == 0.0
    assert reward_spread([0.0, 1.0, 1.0, 1.0], 2) == pytest.approx(0.25)
    assert reward_spread([0.0, None, 1.0, math.nan], 4) == pytest.approx(0.5)
    assert reward_spread([None, None], 2) is None


def test_completion_metrics():
    values = completion_metrics([[7] * 13, [1, 2, 3]])
    assert values["monitor/repetition"] == pytest.approx(0.45)
    assert values["monitor/length_tokens"] == 8.0
    assert values["monitor/distinct_2"] == pytest.approx(3 / 14)
    assert completion_metrics([])["monitor/length_tokens"] == 0.0
