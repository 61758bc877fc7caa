"""Numbers about completions and their scores, which rewards, monitors and records all read."""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of one completion that repeat an earlier one, 0 to 1; 0 for fewer than n tokens."""
    total = len(ids) - n + 1
    if total < 1:
        return 0.0
    return 1.0 - len({tuple(ids[start : start + n]) for start in range(total)}) / total


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of several completions, 0 to 1; 1 where there are none.

    Source: Li et al. 2016, "A diversity-promoting objective function", arXiv 1510.03055, section 5.
    """
    grams = [tuple(ids[start : start + n]) for ids in completions for start in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def reward_spread(scores: Sequence[float | None], num_generations: int) -> float | None:
    """Mean over prompts of the standard deviation (over G, not G - 1) of the scores of its completions.

    Scores that are None or NaN are left out; None if no prompt has a score left.
    """
    deviations = []
    for start in range(0, len(scores), num_generations):
        group = [s for s in scores[start : start + num_generations] if s is not None and not math.isnan(s)]
        if group:
            deviations.append(pstdev(group))
    return fmean(deviations) if deviations else None


def completion_metrics(completion_ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """`monitor/repetition`, `monitor/distinct_2` and `monitor/length_tokens` of a batch of completions."""
    count = max(len(completion_ids), 1)
    return {
        "monitor/repetition": sum(repetition(ids) for ids in completion_ids) / count,
        "monitor/distinct_2": distinct_n(completion_ids, 2),
        "monitor/length_tokens": sum(len(ids) for ids in completion_ids) / count,
    }
