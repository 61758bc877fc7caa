"""What may be said: one sentence for each claim, and no word that so few seeds don't allow."""

from collections.abc import Iterable

from selfdistill.comparison.analysis import Claim, Comparison, FieldResult, Level
from selfdistill.comparison.statistics import ENOUGH_FOR_A_TEST, MOST_SEEDS, Interval, smallest_p
from selfdistill.goals import is_more_better

NAMES = {"eval/accuracy": "accuracy", "eval/retention": "retention", "eval/forgetting": "forgetting"}


def name_of(metric: str) -> str:
    return NAMES.get(metric, metric)


def figure(value: float) -> str:
    """Three decimals; one digit of a number that would be 0.000, three of a large one."""
    if 0 < abs(value) < 0.0005:
        return f"{value:.1g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def span(interval: Interval | None) -> str:
    return "" if interval is None else f"[{figure(interval.low)}, {figure(interval.high)}]"


def seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def level(found: Level) -> str:
    """`0.712 [0.608, 0.816] (3 seeds)`."""
    return " ".join(filter(None, [figure(found.mean), span(found.interval), f"({seeds(len(found.by_seed))})"]))


def sentence(claim: Claim) -> str:
    """What a claim says, with its number of seeds, its interval, and in how many of them it holds."""
    seen, metric, count = claim.difference, name_of(claim.metric), len(claim.difference.values)
    over = f", each the mean of {claim.cells} settings" if claim.cells > 1 else ""
    parts = []
    if count == 1:
        parts.append(
            f"{claim.first} against {claim.second}, {metric}: {seen.mean:+.3f}: not decided with 1 seed{over}, "
            "which shows no spread"
        )
    elif not seen.shows_spread and seen.p is None:
        same = "the same" if seen.mean == 0 else f"{seen.mean:+.3f}"
        parts.append(
            f"{claim.first} against {claim.second}, {metric}: {same} in each of {seeds(count)}{over}: not decided, "
            "since no spread was seen"
        )
    elif seen.is_decided:
        word = "higher" if seen.mean > 0 else "lower"
        parts.append(
            f"{claim.first} has {word} {metric} than {claim.second} by {figure(abs(seen.mean))} "
            f"{span(_unsigned(seen.interval, seen.mean))} ({seeds(count)}{over}, in {seen.agreeing} of {count})"
        )
        if seen.p is None:
            parts.append(f"{count} paired seeds cannot show p < {smallest_p(count):.3g}")
    else:
        needed = f"more than {MOST_SEEDS:,}" if seen.needed is None else f"about {seen.needed}"
        parts.append(
            f"{claim.first} against {claim.second}, {metric}: {seen.mean:+.3f} {span(seen.interval)}: "
            f"not decided with {seeds(count)}{over}: {needed} would be needed"
        )
    if seen.p is not None:
        parts.append(f"permutation p = {seen.p:.3g}{_corrected(claim)}")
    if seen.is_decided and not seen.is_decided_among_all:
        parts.append(f"not decided when all {claim.together} comparisons are taken together")
    if claim.left_out:
        parts.append(f"{claim.left_out} {'run' if claim.left_out == 1 else 'runs'} without a partner left out")
    if claim.items:
        low = sum(test.p < 0.05 for test in claim.items.values())
        parts.append(
            f"on the same {next(iter(claim.items.values())).items} items McNemar's exact p < 0.05 "
            f"in {low} of {len(claim.items)} pairs of runs"
        )
    return "; ".join(parts) + "."


def _corrected(claim: Claim) -> str:
    """What Holm's correction makes of a p, and for how many comparisons: only those of enough pairs have a p."""
    tested = claim.difference.tested
    if claim.together == 1:
        return ""
    if tested == 1:
        return f", not corrected: of {claim.together} comparisons no other has {ENOUGH_FOR_A_TEST} pairs"
    of = f"the {tested} of {claim.together} comparisons that have {ENOUGH_FOR_A_TEST} pairs"
    whom = of if tested < claim.together else tested
    return f", {claim.difference.p_holm:.3g} after Holm's correction for {whom}"


def _unsigned(interval: Interval | None, mean: float) -> Interval | None:
    if interval is None or mean > 0:
        return interval
    return Interval(-interval.high, -interval.low)


def verdict(result: FieldResult) -> tuple[str, str, str]:
    """Which setting is best, how sure that is in one line, and what that rests on."""
    best, metric, others = result.rows[0], result.metrics[0], len(result.rows) - 1
    word = "Highest" if is_more_better(metric) else "Lowest"
    head = f"{word} {name_of(metric)}: {best.setting.label} with {level(best.levels[metric])}."
    if not others:
        return (
            f"{best.setting.label}: {name_of(metric)} {level(best.levels[metric])}.",
            "There is nothing to compare.",
            "",
        )
    if not result.best:
        return head, "Not decided: it shares no seed with another setting, so nothing can be paired.", ""
    alone = [claim for claim in result.best if claim.better]
    open_ones = [claim for claim in result.best if claim not in alone]
    nearest = next((claim for claim in open_ones if len(claim.difference.values) > 1), (open_ones or result.best)[0])
    count = seeds(max(len(claim.difference.values) for claim in result.best))
    unpaired = others - len(result.best)
    if is_decided(result):
        how = f"Decided with {count}: better than {_each(others)}" + (", taken together." if others > 1 else ".")
    elif len(alone) == others:
        how = f"Likely with {count}: better than {_each(others)} one by one, not when all are taken together."
    elif others == 1:
        how = f"Not decided with {count}: the other setting may be as good."
    else:
        how = f"Not decided with {count}: {others - len(alone)} of the {others} other settings may be as good"
        how += f", of which {unpaired} {'shares' if unpaired == 1 else 'share'} no seed with it." if unpaired else "."
    return head, how, sentence(nearest)


def is_decided(result: FieldResult) -> bool:
    """Whether the best setting is known to be better than each other one, when all are taken together."""
    sure = [claim for claim in result.best if claim.better and claim.difference.is_decided_among_all]
    return len(sure) == len(result.rows) - 1 > 0


def _each(others: int) -> str:
    return "the other setting" if others == 1 else f"each of the {others} other settings"


def together(result: FieldResult) -> str:
    """What is said about looking at many comparisons at once; empty where there is one."""
    counts = {claim.together for claim in result.claims}
    most = max(counts, default=1)
    if most < 2:
        return ""
    tested = max(claim.difference.tested for claim in result.claims if claim.together == most)
    how = "intervals widened by Bonferroni"
    if tested > 1:
        how += ", p corrected by Holm" + (f" for the {tested} that have one" if tested < most else "")
    return (
        f"{most} comparisons with the baseline for each metric: of intervals at 95% about {most * 0.05:.1g} would miss "
        f"by chance alone; what is decided when all are taken together ({how}) is said. The best of "
        f"{len(result.rows)} means is too high on average: repeat it with seeds of its own before it is quoted."
    )


def sentences(claims: Iterable[Claim]) -> list[str]:
    """The claims' sentences, in order."""
    return [sentence(claim) for claim in ordered(claims)]


def ordered(claims: Iterable[Claim]) -> list[Claim]:
    """Metric by metric, what is decided first, and the largest difference first."""
    known = list(claims)
    metrics = list(dict.fromkeys(claim.metric for claim in known))
    return sorted(
        known,
        key=lambda one: (metrics.index(one.metric), not one.difference.is_decided, -abs(one.difference.mean)),
    )


def all_text(comparison: Comparison) -> list[str]:
    """All that is claimed, in order: what is best, what the keys do, each setting against the baseline."""
    lines = list(comparison.notes)
    for result in comparison.fields:
        if len(comparison.fields) > 1:
            conditions = " ".join(f"{key}={value}" for key, value in result.field.conditions.items())
            lines.append(f"Of the runs with {conditions}:")
        lines += [*verdict(result), *sentences(result.keys), *sentences(result.claims), together(result)]
    return [line for line in lines if line]
