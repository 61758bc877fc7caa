"""Statistics against naive enumerations, scipy's own tests on drawn cases, and simulations."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from selfdistill.comparison import statistics
from selfdistill.comparison.statistics import Interval

RNG = np.random.default_rng(7)


def test_the_interval_of_a_mean_is_that_of_the_t_test() -> None:
    for count in (2, 3, 5, 8):
        values = RNG.normal(0.3, 1.0, count)
        expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        found = statistics.mean_interval(list(values))
        assert found is not None
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert statistics.mean_interval([1.0]) is None


@pytest.mark.parametrize("count", [2, 3, 6, 9])
def test_the_permutation_p_counts_sign_patterns(count: int) -> None:
    values = np.round(RNG.normal(0.4, 1.0, count), 2)
    means = [np.mean(np.array(signs) * values) for signs in product((1, -1), repeat=count)]
    expected = np.mean([abs(mean) >= abs(np.mean(values)) - 1e-12 for mean in means])
    assert statistics.permutation_p(list(values)) == pytest.approx(expected)


def test_no_test_is_better_than_its_smallest_p() -> None:
    assert [statistics.smallest_p(pairs) for pairs in (1, 3, 5, 6)] == [1.0, 0.25, 0.0625, 0.03125]
    assert statistics.permutation_p([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx(statistics.smallest_p(6))
    assert statistics.permutation_p([0.0] * 6) == 1.0


def test_few_seeds_have_no_p_and_six_have_one() -> None:
    few, six = statistics.differences([[0.1, 0.11, 0.12], [0.1, 0.11, 0.12, 0.1, 0.11, 0.12]])
    assert few.p is None and few.p_holm is None
    assert six.p == pytest.approx(0.03125)
    assert six.p_holm == pytest.approx(0.03125)  # the only test in its family
    assert few.tested == six.tested == 1
    assert few.is_decided and six.is_decided


def test_more_seeds_are_needed_than_did_not_decide() -> None:
    """The t interval excludes 0, and the permutation test, which has six pairs, does not agree."""
    (seen,) = statistics.differences([[0.10, 0.11, 0.09, 0.10, 0.105, -0.01]])
    assert seen.interval is not None and seen.interval.excludes_zero
    assert seen.p == pytest.approx(0.0625)
    assert statistics.seeds_needed(seen.mean, float(np.std(seen.values, ddof=1))) == 5
    assert not seen.is_decided and seen.needed == 7


def test_one_pair_and_equal_pairs_decide_nothing() -> None:
    single, equal = statistics.differences([[0.5], [0.58 - 0.575, 0.575 - 0.57, 0.005]])
    assert not single.is_decided and single.needed is None
    assert not equal.shows_spread  # though floating point numbers differ in their last digits
    assert not equal.is_decided


def test_a_family_is_harder_to_convince_than_one_comparison() -> None:
    values = [0.10, 0.12, 0.15]
    (alone,) = statistics.differences([values])
    together, *_ = statistics.differences([values] + [[0.1, -0.1, 0.0]] * 19)
    assert alone.is_decided_among_all
    assert together.is_decided and not together.is_decided_among_all
    assert together.widened is not None and together.interval is not None
    assert together.widened.low < together.interval.low


def test_holm_is_the_step_down_rule() -> None:
    p_values = [0.04, 0.001, 0.03, 0.5]
    # smallest × 4, second × 3, third × 2, last × 1, and never below the one before
    assert statistics.holm(p_values) == pytest.approx([0.09, 0.004, 0.09, 0.5])
    assert statistics.holm([]) == []


@pytest.mark.parametrize(("size", "power"), [(0.4, 0.8), (1.0, 0.8), (3.0, 0.8), (0.7, 0.9)])
def test_the_number_of_seeds_is_the_first_with_the_power(size: float, power: float) -> None:
    found = statistics.seeds_needed(size, 1.0, power)
    reached = [
        stats.nct.sf(stats.t.ppf(0.975, count - 1), count - 1, size * math.sqrt(count)) >= power
        for count in range(2, 400)
    ]
    assert found == 2 + reached.index(True)


def test_the_number_of_seeds_gives_that_power_in_a_simulation() -> None:
    needed = statistics.seeds_needed(0.8, 1.0)
    assert needed is not None
    drawn = RNG.normal(0.8, 1.0, (4000, needed))
    share = np.mean((stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05) & (drawn.mean(axis=1) > 0))
    assert 0.77 < share < 0.86


def test_no_number_of_seeds_finds_nothing() -> None:
    assert statistics.seeds_needed(0.0, 1.0) is None
    assert statistics.seeds_needed(0.01, 1.0) is None
    assert statistics.seeds_needed(0.1, 1.0) == 787
    assert statistics.seeds_needed(0.1, 0.0) == 2


@pytest.mark.parametrize("right", [0, 3, 100, 200])
def test_wilson_is_its_formula(right: int) -> None:
    items, z = 200, stats.norm.ppf(0.975)
    share = right / items
    middle = (share + z**2 / (2 * items)) / (1 + z**2 / items)
    half = z / (1 + z**2 / items) * math.sqrt(share * (1 - share) / items + z**2 / (4 * items**2))
    found = statistics.wilson(right, items)
    assert (found.low, found.high) == pytest.approx((max(middle - half, 0.0), min(middle + half, 1.0)))


def test_mcnemar_counts_the_items_that_only_one_has_right() -> None:
    first = np.array([True] * 9 + [False] * 2 + [True] * 5)
    second = np.array([False] * 9 + [True] * 2 + [True] * 5)
    found = statistics.mcnemar(first, second)
    assert (found.items, found.only_first, found.only_second) == (16, 9, 2)
    expected = 2 * sum(math.comb(11, count) for count in range(3)) / 2**11
    assert found.p == pytest.approx(expected)
    assert statistics.mcnemar(first, first).p == 1.0


def test_the_probability_of_improvement_is_the_rank_tests() -> None:
    first, second = list(RNG.normal(0.5, 1, 7)), list(RNG.normal(0, 1, 9))
    expected = stats.mannwhitneyu(first, second).statistic / (7 * 9)
    assert statistics.probability_of_improvement([first], [second]) == pytest.approx(expected)
    assert statistics.probability_of_improvement([[1.0, 2.0], [1.0]], [[1.0], [3.0]]) == pytest.approx((0.75 + 0.0) / 2)


def test_the_interquartile_mean_is_that_of_the_middle_half() -> None:
    values = np.array([9.0, 1.0, 2.0, 3.0, 4.0, 100.0, 5.0, 6.0])
    assert statistics.iqm(values[:4], values[4:]) == pytest.approx(np.mean([3.0, 4.0, 5.0, 6.0]))


def test_the_bootstrap_stays_within_strata() -> None:
    """Two tasks far from each other: resampling over both together would give an interval as wide as the gap."""
    strata = [list(RNG.normal(0.0, 0.01, 8)), list(RNG.normal(1.0, 0.01, 8))]
    found = statistics.iqm_interval(strata)
    assert found is not None
    assert found.high - found.low < 0.1
    assert found.low <= float(statistics.iqm(*map(np.asarray, strata))) <= found.high
    assert found == statistics.iqm_interval(strata)  # the same every time it is asked
    assert statistics.iqm_interval([[0.1] * 5]) is None
    assert statistics.iqm_interval([[0.5] * 6]) == Interval(0.5, 0.5)


@pytest.mark.parametrize("count", [5, 10])
def test_intervals_of_differences_cover_as_often_as_they_say(count: int) -> None:
    drawn = RNG.normal(0.1, 0.3, (2000, count)) - RNG.normal(0.0, 0.3, (2000, count))
    intervals = [statistics.mean_interval(values) for values in drawn.tolist()]
    covered = np.mean([interval is not None and interval.low <= 0.1 <= interval.high for interval in intervals])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("count", [5, 10])
def test_intervals_of_differences_of_accuracies_cover_as_often_as_they_say(count: int) -> None:
    """Shares of 200 items, each seed with a luck of its own that both settings share."""
    luck = RNG.normal(0.0, 0.05, (2000, count))
    first, second = (RNG.binomial(200, np.clip(mean + luck, 0, 1)) / 200 for mean in (0.8, 0.7))
    intervals = [statistics.mean_interval(values) for values in (first - second).tolist()]
    covered = np.mean([interval is not None and interval.low <= 0.1 <= interval.high for interval in intervals])
    assert 0.93 <= covered <= 0.97


@pytest.mark.long
@pytest.mark.parametrize("tasks", [1, 4])
def test_bootstrap_intervals_cover_as_often_as_they_say(tasks: int) -> None:
    """Ten seeds; under six there is no bootstrap."""
    centres = np.arange(tasks) * 0.5
    quantiles = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    true = float(statistics.iqm(*(centre + quantiles for centre in centres)))
    covered = 0
    for _ in range(2000):
        found = statistics.iqm_interval(RNG.normal(centres, 1.0, (10, tasks)).T.tolist())
        covered += found is not None and found.low <= true <= found.high
    assert 0.93 <= covered / 2000 <= 0.97
