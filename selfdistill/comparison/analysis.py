"""What runs show together: the settings in order, and what can be claimed of them with so many seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from selfdistill.comparison import statistics
from selfdistill.comparison.reading import COMPLETE, RunSet
from selfdistill.comparison.settings import Field, Setting, Sorted, Unit, number, shown, sort_runs
from selfdistill.comparison.statistics import Difference, Interval, McNemar
from selfdistill.errors import UserError
from selfdistill.goals import is_more_better

ACCURACY = "eval/accuracy"
RETENTION = "eval/retention"
# A metric of the training counts as the mean of this share of its last logged steps.
LAST_SHARE = 0.1


@dataclass(frozen=True)
class Level:
    """One metric of one setting.

    Attributes:
        by_seed: of each seed the value, which is the mean over the keys that are averaged over.
        interval: the t interval of the mean over seeds; None for a single seed.
        iqm, iqm_interval: the interquartile mean over tasks × seeds and its bootstrap interval, from six seeds on.
    """

    units: dict[Unit, float]
    by_seed: dict[Any, float]
    mean: float
    interval: Interval | None
    iqm: float | None
    iqm_interval: Interval | None


@dataclass(frozen=True)
class Row:
    """A setting with its metrics; rank 1 is the best by the metric that decides."""

    rank: int
    setting: Setting
    levels: dict[str, Level]


@dataclass(frozen=True)
class Claim:
    """A comparison of two settings, or of two values of a key.

    Attributes:
        kind: `baseline` (a setting and the baseline), `key` (two values of one key) or `best` (the best and another).
        difference: of `first` minus `second`, paired by seed.
        improvement: probability that a run of `first` has the higher value; None for a key.
        items: McNemar's tests of pairs of runs that answered the same items, by seed.
        together: comparisons in its family.
        cells: settings that a key's values are averaged over.
        left_out: seeds that only one of the two has.
    """

    kind: str
    metric: str
    first: str
    second: str
    difference: Difference
    improvement: float | None
    items: dict[str, McNemar]
    together: int
    cells: int = 1
    left_out: int = 0

    @property
    def better(self) -> bool | None:
        """Whether `first` is the better one; None where that is not decided."""
        if not self.difference.is_decided:
            return None
        return (self.difference.mean > 0) == is_more_better(self.metric)


@dataclass(frozen=True)
class Effect:
    """One swept key: the values that it took, and the metric at each, by seed, averaged over the same settings.

    Attributes:
        cells: how many settings each value is averaged over.
    """

    key: str
    metric: str
    by_value: dict[str, dict[Any, float]]
    cells: int


@dataclass(frozen=True)
class FieldResult:
    """What one field shows; see `Field`."""

    field: Field
    metrics: list[str]
    rows: list[Row]
    baseline: Setting
    baseline_why: str
    best: list[Claim]
    keys: list[Claim]
    claims: list[Claim]
    effects: list[Effect]


@dataclass(frozen=True)
class Comparison:
    """Runs, compared.

    Attributes:
        metric: the metric that decides which setting is best.
        fields: what each field shows, the largest first.
    """

    found: RunSet
    sorted: Sorted
    metric: str
    fields: list[FieldResult]
    notes: list[str] = field(default_factory=list)


def compare(
    found: RunSet,
    *,
    metric: str = ACCURACY,
    baseline: str | Mapping[str, Any] | None = None,
    by: Sequence[str] = (),
    force: bool = False,
) -> Comparison:
    """Compare runs.

    Args:
        metric: what decides: a metric of the last evaluation, or one of the training, of which the last tenth counts.
        baseline: the setting that the others are compared with, as `alpha=0 beta=0` or as a mapping; when None, the
            one with the most seeds, of several the one that was started first.
        by: keys that make a setting; the other differing keys are averaged over.
        force: compare also runs with other data, evaluation, model or budget.

    Raises:
        UserError: no run has the metric, or `by` or `baseline` fits none.
    """
    notes = []
    if not _has(found.runs, metric) and metric == ACCURACY and "reward" in found.curves:
        metric = "reward"
        notes.append("No run was evaluated: the mean reward of the last tenth of the steps is compared.")
    # Where no run is finished there is nothing to compare, but reasons to read.
    if not _has(found.runs, metric) and (found.runs["status"] == COMPLETE).any():
        found = _with_last_steps(found, metric)
    ordered = sort_runs(found, metric, by, force)
    metrics = [metric] + [RETENTION] * (metric != RETENTION and _has(found.runs, RETENTION))
    results = [
        _field_result(found, one, metrics, baseline if position == 0 else None)
        for position, one in enumerate(ordered.fields)
        if one.settings
    ]
    return Comparison(found, ordered, metric, results, notes)


def _has(runs: pd.DataFrame, metric: str) -> bool:
    return metric in runs and bool(runs[metric].notna().any())


def _with_last_steps(found: RunSet, metric: str) -> RunSet:
    if metric not in found.curves or not found.curves[metric].notna().any():
        names = sorted(str(name) for name in [*found.runs.columns, *found.curves.columns] if "/" in str(name))
        raise UserError(f"metric={metric}: no run has it; known here: {', '.join(names)[:200]}.")
    curves = found.curves[["run", "step", metric]].dropna()
    last = curves.groupby("run", observed=True)["step"].transform("max")
    means = curves[curves["step"] > last * (1 - LAST_SHARE)].groupby("run", observed=True)[metric].mean()
    runs = found.runs.assign(**{metric: means.reindex(found.runs.index)})
    return RunSet(runs, found.configs, found.chosen, found.curves, found.provenance)


def _field_result(
    found: RunSet, one: Field, metrics: Sequence[str], baseline: str | Mapping[str, Any] | None
) -> FieldResult:
    known = [metric for metric in metrics if found.runs.loc[one.runs, metric].notna().all()]
    levels = [{metric: _level(found, setting, metric) for metric in known} for setting in one.settings]
    sign = -1 if is_more_better(known[0]) else 1
    # A setting with a single seed stands behind those that were repeated: its place is luck.
    order = sorted(
        range(len(levels)),
        key=lambda i: (len(levels[i][known[0]].by_seed) < 2, sign * levels[i][known[0]].mean),
    )
    rows = [Row(rank, one.settings[i], levels[i]) for rank, i in enumerate(order, start=1)]
    chosen, why = _baseline(one, baseline)
    against = [row for row in rows if row.setting is not chosen]
    base = next(row for row in rows if row.setting is chosen)
    claims = [claim for metric in known for claim in _claims("baseline", metric, against, base, found)]
    best = [_turned(claim) for claim in _claims("best", known[0], rows[1:], rows[0], found)]
    tried = [_effect(one, rows, metric, knob) for metric in known for knob in one.knobs]
    effects = [effect for effect in tried if effect is not None]
    keys = _key_claims(effects, chosen) if len(one.knobs) > 1 else []
    return FieldResult(one, known, rows, chosen, why, best, keys, claims, effects)


def _level(found: RunSet, setting: Setting, metric: str) -> Level:
    units = {unit: float(found.runs.at[run, metric]) for unit, run in setting.runs.items()}
    by_seed = _by_seed(units)
    strata: dict[Any, list[float]] = {}
    for (stratum, _), value in units.items():
        strata.setdefault(stratum, []).append(value)
    interval = statistics.iqm_interval(list(strata.values()))
    return Level(
        units,
        by_seed,
        float(np.mean(list(by_seed.values()))),
        statistics.mean_interval(list(by_seed.values())),
        None if interval is None else float(statistics.iqm(*map(np.asarray, strata.values()))),
        interval,
    )


def _by_seed(units: Mapping[Unit, float]) -> dict[Any, float]:
    """Of each seed the mean over the other keys: runs of one seed share data order and start, and count once."""
    seeds: dict[Any, list[float]] = {}
    for (_, seed), value in units.items():
        seeds.setdefault(seed, []).append(value)
    return {
        seed: float(np.mean(seeds[seed]))
        for seed in sorted(seeds, key=lambda seed: (number(str(seed)) or 0, str(seed)))
    }


def _item_tests(found: RunSet, first: Setting, second: Setting) -> dict[str, McNemar]:
    """McNemar's tests between the runs of two settings that answered the same items."""
    tests = {}
    for unit in [unit for unit in first.runs if unit in second.runs]:
        ours, theirs = found.verdicts(first.runs[unit]), found.verdicts(second.runs[unit])
        if len(ours) and ours.index.equals(theirs.index):
            test = statistics.mcnemar(ours.to_numpy(), theirs.to_numpy())
            tests[" ".join((*unit[0], f"seed={unit[1]}"))] = test
    return tests


def _claims(kind: str, metric: str, rows: Sequence[Row], base: Row, found: RunSet) -> list[Claim]:
    """Each row against one other, paired by seed and by the keys that are averaged over."""
    ours = [row for row in rows if row.levels[metric].units.keys() & base.levels[metric].units.keys()]
    theirs = base.levels[metric].units
    families = []
    for row in ours:
        units = row.levels[metric].units
        families.append(list(_by_seed({unit: units[unit] - theirs[unit] for unit in units if unit in theirs}).values()))
    return [
        Claim(
            kind,
            metric,
            row.setting.label,
            base.setting.label,
            difference,
            statistics.probability_of_improvement(*_strata(row.levels[metric].units, theirs)),
            _item_tests(found, row.setting, base.setting) if metric == ACCURACY else {},
            len(ours),
            left_out=len(row.levels[metric].units.keys() ^ theirs.keys()),
        )
        for row, difference in zip(ours, statistics.differences(families), strict=True)
    ]


def _turned(claim: Claim) -> Claim:
    """The same claim, said of the other side."""
    (difference,) = statistics.differences([[-value for value in claim.difference.values]])
    seen = claim.difference
    turned = Difference(
        **{
            **vars(difference),
            "widened": Interval(-seen.widened.high, -seen.widened.low) if seen.widened else None,
            "p_holm": seen.p_holm,
            "tested": seen.tested,
        }
    )
    improvement = None if claim.improvement is None else 1 - claim.improvement
    items = {unit: McNemar(test.items, test.only_second, test.only_first, test.p) for unit, test in claim.items.items()}
    changed = {"first": claim.second, "second": claim.first, "difference": turned, "improvement": improvement}
    changed["items"] = items
    return Claim(**{**vars(claim), **changed})


def _strata(ours: Mapping[Unit, float], theirs: Mapping[Unit, float]) -> tuple[list[list[float]], list[list[float]]]:
    shared = list(dict.fromkeys(unit[0] for unit in ours if any(unit[0] == other[0] for other in theirs)))
    return tuple(  # type: ignore[return-value]
        [[value for unit, value in units.items() if unit[0] == stratum] for stratum in shared]
        for units in (ours, theirs)
    )


def _effect(one: Field, rows: Sequence[Row], metric: str, knob: str) -> Effect | None:
    """The metric at each value of a key, over the units and other keys that all its values have; None without any."""
    cells: dict[str, dict[Unit, float]] = {}
    for row in rows:
        others = tuple(value for key, value in row.setting.values.items() if key != knob)
        for (stratum, seed), value in row.levels[metric].units.items():
            cells.setdefault(row.setting.values[knob], {})[((*others, *stratum), seed)] = value
    shared = set.intersection(*(set(units) for units in cells.values()))
    if not shared or len(cells) < 2:
        return None
    values = sorted(cells, key=lambda text: (number(text) is None, number(text) or 0.0, text))
    by_value = {
        value: _by_seed({unit: cells[value][unit] for unit in cells[value] if unit in shared}) for value in values
    }
    return Effect(knob, metric, by_value, len({unit[0] for unit in shared}))


def _key_claims(effects: Sequence[Effect], baseline: Setting) -> list[Claim]:
    """Each value of each key against the baseline's value of it."""
    claims = []
    for metric in dict.fromkeys(effect.metric for effect in effects):
        compared = [
            (effect, value, baseline.values[effect.key])
            for effect in effects
            if effect.metric == metric
            for value in effect.by_value
            if value != baseline.values[effect.key]
        ]
        families = [
            [effect.by_value[value][seed] - effect.by_value[base][seed] for seed in effect.by_value[base]]
            for effect, value, base in compared
        ]
        for (effect, value, base), difference in zip(compared, statistics.differences(families), strict=True):
            key = effect.key
            claims.append(
                Claim(
                    "key", metric, f"{key}={value}", f"{key}={base}", difference, None, {}, len(compared), effect.cells
                )
            )
    return claims


def _baseline(one: Field, given: str | Mapping[str, Any] | None) -> tuple[Setting, str]:
    if given is None:
        most = max(len(setting.runs) for setting in one.settings)
        first = next(setting for setting in one.settings if len(setting.runs) == most)
        return first, "started first of those with the most runs; baseline=… names another"
    wanted = dict(given) if isinstance(given, Mapping) else dict(part.partition("=")[::2] for part in given.split())
    texts = {key: shown(_as_number(value)) for key, value in wanted.items()}
    fitting = [s for s in one.settings if all(s.values.get(key) == value for key, value in texts.items())]
    if len(fitting) != 1:
        asked = " ".join(f"{key}={value}" for key, value in texts.items())
        known = "; ".join(setting.label for setting in (fitting or one.settings)[:12])
        which = "fits several settings: say more of its keys" if fitting else "is no setting"
        raise UserError(f"baseline={asked[:200]!r} {which}. There are: {known}.")
    return fitting[0], "named by baseline="


def _as_number(value: Any) -> Any:
    as_number = number(value) if isinstance(value, str) else None
    return value if as_number is None else as_number
