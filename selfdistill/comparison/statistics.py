"""What few seeds allow to be said: intervals, exact tests, and how many seeds would be needed.

The ideas of Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice"
(arXiv 2108.13264): interquartile means, bootstrap within strata, probability of improvement. All computed by scipy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
# From so many pairs on an exact test can reach p < 0.05: the smallest p of n pairs is 2 / 2^n.
ENOUGH_FOR_A_TEST = 6
RESAMPLES = 5_000
# Up to so many pairs the permutation test visits every sign pattern; above, as many random ones.
EXACT_PAIRS = 14
POWER = 0.8
MOST_SEEDS = 1_000

Values = Sequence[float]


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference:
    """What the paired differences of two settings show.

    Attributes:
        values: one difference for each pair.
        mean: their mean.
        interval: the paired t interval of the mean; None for a single pair.
        widened: the same, so wide that all comparisons of its family hold together in 95% of cases (Bonferroni).
        agreeing: pairs whose difference has the sign of the mean.
        p: of the exact paired permutation test, two-sided; None for fewer than six pairs, which cannot be significant.
        p_holm: p after Holm's correction for those of the family that have a p; None where p is.
        tested: how many of the family have a p.
        smallest_p: the smallest p that so many pairs can give.
        needed: pairs with which the t test finds a difference of this size in 80% of cases, and more than there are
            where the permutation test says that those do not decide; None where it is not known or more than 1,000.
    """

    values: tuple[float, ...]
    mean: float
    interval: Interval | None
    widened: Interval | None
    agreeing: int
    p: float | None
    p_holm: float | None
    tested: int
    smallest_p: float
    needed: int | None

    @property
    def shows_spread(self) -> bool:
        """Whether the differences differ from each other."""
        return len(set(self.values)) > 1

    @property
    def is_decided(self) -> bool:
        """Whether the sign is known: the interval excludes 0, and from six pairs on the test agrees.

        A few differences that are all equal have an interval without width, which says nothing.
        """
        if self.interval is None or not self.interval.excludes_zero:
            return False
        return self.shows_spread if self.p is None else self.p < 1 - CONFIDENCE

    @property
    def is_decided_among_all(self) -> bool:
        """Whether it is still known when all comparisons of the family are taken together."""
        if not self.is_decided or self.widened is None or not self.widened.excludes_zero:
            return False
        return self.p_holm is None or self.p_holm < 1 - CONFIDENCE


def mean_interval(values: Values, confidence: float = CONFIDENCE) -> Interval | None:
    """The t interval of a mean; None for fewer than two values."""
    count = len(values)
    if count < 2:
        return None
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    mean = float(np.mean(values))
    return Interval(mean - half, mean + half)


def differences(families: Sequence[Values]) -> list[Difference]:
    """What each list of paired differences shows, when all of them are looked at together.

    Args:
        families: for each comparison of the family, its paired differences, at least one.
    """
    # 0.575 - 0.57 and 0.58 - 0.575 are the same difference, which floating point numbers don't know.
    families = [[round(float(value), 12) for value in values] for values in families]
    tested = [permutation_p(values) if len(values) >= ENOUGH_FOR_A_TEST else None for values in families]
    corrected = iter(holm([p for p in tested if p is not None]))
    together = 1 - (1 - CONFIDENCE) / max(len(families), 1)
    return [
        Difference(
            values=tuple(values),
            mean=float(np.mean(values)),
            interval=mean_interval(values),
            widened=mean_interval(values, together),
            agreeing=int(np.sum(np.sign(values) == np.sign(np.mean(values)))),
            p=p,
            p_holm=None if p is None else next(corrected),
            tested=sum(p is not None for p in tested),
            smallest_p=smallest_p(len(values)),
            needed=_needed(values, p),
        )
        for values, p in zip(families, tested, strict=True)
    ]


def _needed(values: Values, p: float | None) -> int | None:
    if len(values) < 2:
        return None
    needed = seeds_needed(float(np.mean(values)), float(np.std(values, ddof=1)))
    open_still = p is not None and p >= 1 - CONFIDENCE
    return max(needed, len(values) + 1) if needed is not None and open_still else needed


def smallest_p(pairs: int) -> float:
    """The smallest two-sided p that an exact test on so many pairs can give: 2 sign patterns of 2^n."""
    return min(1.0, 2.0 / 2**pairs)


def permutation_p(values: Values) -> float:
    """Two-sided p of the paired permutation test on the mean difference; exact up to 14 pairs."""
    pairs = np.asarray(values, dtype=float)
    if not pairs.any():
        return 1.0
    outcome = stats.permutation_test(
        (pairs, np.zeros_like(pairs)),
        lambda first, second, axis: np.mean(first - second, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**EXACT_PAIRS,
        rng=np.random.default_rng(0),
    )
    return float(outcome.pvalue)


def holm(p_values: Values) -> list[float]:
    """p values after Holm's step-down correction (Holm 1979), which bounds the chance of any false claim among them."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    corrected = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(value) for value in corrected[np.argsort(order)]]


def seeds_needed(mean: float, deviation: float, power: float = POWER) -> int | None:
    """Pairs with which a paired t test finds this difference with this power; None if more than 1,000.

    Args:
        mean: the mean difference that was seen.
        deviation: the standard deviation of the differences, over n - 1.
    """
    if mean == 0.0:
        return None
    if deviation == 0.0:
        return 2
    size = abs(mean) / deviation
    # What the normal distribution says is at most a few pairs too low, so that only those above it are tried.
    normal = (stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(power)) ** 2 / size**2
    if normal > MOST_SEEDS:
        return None
    counts = np.arange(max(2, math.floor(normal)), math.floor(normal) + 16)
    freedom = counts - 1
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    reached = stats.nct.sf(critical, freedom, size * np.sqrt(counts)) >= power
    needed = int(counts[np.argmax(reached)])
    return needed if needed <= MOST_SEEDS else None


def iqm(*strata: Any, axis: int = -1) -> Any:
    """The interquartile mean of all values together: the mean of the middle half."""
    return stats.trim_mean(np.concatenate(strata, axis=axis), 0.25, axis=axis)


def iqm_interval(strata: Sequence[Values]) -> Interval | None:
    """The interval of the interquartile mean by the bootstrap within strata, that is over tasks × seeds.

    The percentiles are those of Student's quantile instead of the normal one, because the percentile bootstrap of few
    values is too narrow (Hesterberg 2015, arXiv 1411.5279, section 5.3).

    Args:
        strata: the values of each task, one for each seed.

    Returns:
        None for a stratum of fewer than six seeds.
    """
    columns = [np.asarray(values, dtype=float) for values in strata]
    if not columns or min(map(len, columns)) < ENOUGH_FOR_A_TEST:
        return None
    if all(np.ptp(column) == 0 for column in columns):
        value = float(iqm(*columns))
        return Interval(value, value)
    freedom = min(map(len, columns)) - 1
    outcome = stats.bootstrap(
        tuple(columns),
        iqm,
        vectorized=True,
        paired=False,
        n_resamples=RESAMPLES,
        method="percentile",
        confidence_level=float(1 - 2 * stats.norm.sf(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))),
        rng=np.random.default_rng(0),
    )
    return Interval(float(outcome.confidence_interval.low), float(outcome.confidence_interval.high))


def wilson(right: int, items: int) -> Interval:
    """Wilson's interval for a share of right answers."""
    found = stats.binomtest(right, items).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(found.low), float(found.high))


@dataclass(frozen=True)
class McNemar:
    """Two models on the same items: how many only the one, or only the other, answered rightly, and the exact p."""

    items: int
    only_first: int
    only_second: int
    p: float


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> McNemar:
    """McNemar's exact test, two-sided.

    Args:
        first, second: whether each item was answered rightly, in the same order.
    """
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    differing = only_first + only_second
    p = float(stats.binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
    return McNemar(len(first), only_first, only_second, p)


def probability_of_improvement(first: Sequence[Values], second: Sequence[Values]) -> float:
    """How often a run of the first setting is above one of the second, ties half; the mean over strata.

    Args:
        first, second: the values of each stratum, in the same order of strata.
    """
    shares = []
    for ours, theirs in zip(first, second, strict=True):
        gaps = np.subtract.outer(np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float))
        shares.append(float(np.mean((gaps > 0) + 0.5 * (gaps == 0))))
    return float(np.mean(shares))
