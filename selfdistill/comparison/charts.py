"""The report's pictures: which setting is best, how sure that is, what it cost, how it learned, what each key does."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from selfdistill.comparison.analysis import RETENTION, Comparison, Effect, FieldResult, Row
from selfdistill.comparison.drawing import COLOURS, GRID, HEIGHT_IN, INK, MUTED, PAPER, REST, Canvas, Chart
from selfdistill.comparison.settings import number
from selfdistill.comparison.wording import figure, name_of

MOST_ROWS = 16  # settings in a picture that has a line for each
MOST_THIN = 72  # runs that a picture of curves shows
MOST_POINTS = 32  # of a curve; the steps between are averaged
MOST_KEYS = 6  # whose effects are drawn
MOST_VALUES = 12  # of a key in a heat map
CLASSES = 5  # of a key with more numbers than that
MOST_DOTS = 200
LEAST_HEIGHT = 0.05  # of retention, in the picture of new skill against old ones
AXES = {
    "step": ("over steps", "optimizer step"),
    "tokens/generated": ("over generated tokens", "generated tokens"),
    "seconds": ("over seconds", "seconds"),
}
HEALTH = {
    "monitor/entropy": "entropy, nats a token",
    "monitor/length_tokens": "completion length, tokens",
    "monitor/sampler_gap": "sampler/trainer gap, nats",
}
TIMES = ("time/generate_s", "time/reward_s", "time/teacher_s", "time/update_s")


def charts(comparison: Comparison) -> Iterator[Chart]:
    """The pictures of the largest field, in the order of the report."""
    result = comparison.fields[0]
    colours = setting_colours(result)
    yield _ranking(result, colours)
    if result.best:
        yield _gaps(result, colours)
    if RETENTION in result.metrics and result.metrics[0] != RETENTION:
        yield _skill_and_retention(result, colours)
    curves = _curves(comparison, result)
    names = [name for name in dict.fromkeys([result.metrics[0], "reward"]) if _has_curve(curves, name)]
    for name in names:
        for axis in AXES:
            if axis in curves and curves[axis].notna().any():
                yield _learning(result, curves, name, axis, colours)
    for effect in result.effects:
        if effect.key in result.field.knobs[:MOST_KEYS]:
            yield _effect(result, effect)
    for first, second in list(combinations(result.field.knobs, 2))[:3]:
        yield _heat(result, first, second)
    for name, words in HEALTH.items():
        if _has_curve(curves, name):
            yield _learning(result, curves, name, "step", colours, section="health", words=words)
    if any(name in curves for name in TIMES):
        yield _times(result, curves)


def setting_colours(result: FieldResult) -> dict[str, str]:
    """A colour for each of the best settings and the baseline; the others share a grey."""
    picked = [row.setting.label for row in result.rows[: len(COLOURS)]]
    if result.baseline.label not in picked:
        picked[-1] = result.baseline.label
    colours = dict.fromkeys((row.setting.label for row in result.rows), REST)
    return colours | dict(zip(picked, COLOURS))


def _shown_rows(result: FieldResult) -> list[Row]:
    rows = result.rows[:MOST_ROWS]
    base = next(row for row in result.rows if row.setting is result.baseline)
    return rows if base in rows else [*rows[:-1], base]


def _line_height(rows: int) -> float:
    return 0.65 + 0.3 * max(rows, 2)


def _name_lines(canvas: Canvas, labels: list[str]) -> None:
    """A name above each line, so that a long one costs no width."""
    canvas.axes.set_yticks([])
    canvas.axes.set_ylim(len(labels) - 0.45, -0.85)
    canvas.axes.spines["left"].set_visible(False)
    for place, label in enumerate(labels):
        canvas.axes.text(
            0.0, place - 0.24, label, transform=canvas.axes.get_yaxis_transform(), va="bottom", ha="left", fontsize=7.2,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
        )  # fmt: skip


def _ranking(result: FieldResult, colours: dict[str, str]) -> Chart:
    metric, rows = result.metrics[0], _shown_rows(result)

    def draw(canvas: Canvas) -> None:
        for place, row in enumerate(rows):
            level, colour = row.levels[metric], colours[row.setting.label]
            if level.interval is not None:
                canvas.axes.plot(
                    [level.interval.low, level.interval.high], [place] * 2, color=colour, lw=2.2, alpha=0.6
                )
            for seed, value in list(level.by_seed.items())[:30]:
                canvas.dot(value, place, colour, f"{row.setting.label} seed={seed}: {figure(value)}", size=4.5)
            canvas.axes.plot([level.mean] * 2, [place - 0.17, place + 0.17], color=INK, lw=1.6, zorder=4)
        _name_lines(canvas, [f"{row.rank}  {row.setting.label}" + _is_base(row, result) for row in rows])
        canvas.axes.set_xlabel(f"{name_of(metric)}: every seed, mean and 95% interval")

    return Chart("settings", "claims", f"{name_of(metric)} of each setting", draw, _line_height(len(rows)))


def _is_base(row: Row, result: FieldResult) -> str:
    return "  (baseline)" if row.setting is result.baseline else ""


def _gaps(result: FieldResult, colours: dict[str, str]) -> Chart:
    claims = result.best[: MOST_ROWS - 1]
    best = result.rows[0].setting.label

    def draw(canvas: Canvas) -> None:
        canvas.axes.axvline(0, color=INK, lw=1)
        for place, claim in enumerate(claims):
            seen, colour = claim.difference, INK if claim.difference.is_decided else MUTED
            if seen.interval is not None:
                canvas.axes.plot([seen.interval.low, seen.interval.high], [place] * 2, color=colour, lw=1.8)
            for value in seen.values[:30]:
                canvas.dot(value, place, colours[claim.second], f"{value:+.3f}", size=4.5)
            canvas.axes.plot([seen.mean] * 2, [place - 0.17, place + 0.17], color=colour, lw=1.6, zorder=4)
        words = ["decided" if claim.difference.is_decided else "not decided" for claim in claims]
        _name_lines(canvas, [f"{claim.second}: {word}" for claim, word in zip(claims, words)])
        canvas.axes.set_xlabel("difference by seed, mean and paired 95% interval")

    title = f"How far {best} is ahead" if len(best) < 34 else "How far the best is ahead"
    return Chart("how_sure", "claims", title, draw, _line_height(len(claims)))


def _joined(result: FieldResult) -> str | None:
    """The key along which settings are joined by lines: the one with the most numbers for values."""
    numeric = {
        knob: len({row.setting.values[knob] for row in result.rows})
        for knob in result.field.knobs
        if all(number(row.setting.values[knob]) is not None for row in result.rows)
    }
    return max(numeric, key=lambda knob: numeric[knob]) if numeric else None


def _skill_and_retention(result: FieldResult, colours: dict[str, str]) -> Chart:
    metric, knob = result.metrics[0], _joined(result)

    def draw(canvas: Canvas) -> None:
        lines: dict[tuple[str, ...], list[Row]] = {}
        for row in result.rows:
            others = tuple(value for key, value in row.setting.values.items() if key != knob)
            lines.setdefault(others, []).append(row)
        if knob is not None and len(lines) <= MOST_ROWS:
            for rows in lines.values():
                ordered = sorted(rows, key=lambda row: number(row.setting.values[knob]) or 0.0)
                points = [(row.levels[metric].mean, row.levels[RETENTION].mean) for row in ordered]
                canvas.axes.plot(*zip(*points), color=REST, lw=0.9, zorder=1)
        drawn = 0
        for row in reversed(result.rows):
            skill, kept, colour = row.levels[metric], row.levels[RETENTION], colours[row.setting.label]
            for seed in skill.by_seed:
                if (drawn := drawn + 1) > MOST_DOTS:
                    break
                tip = f"{row.setting.label} seed={seed}: {figure(skill.by_seed[seed])}, {figure(kept.by_seed[seed])}"
                canvas.dot(skill.by_seed[seed], kept.by_seed[seed], colour, tip, size=3.6)
            canvas.axes.plot([skill.mean], [kept.mean], "o", ms=8.5, color=colour, zorder=5)
            if row.rank <= MOST_ROWS:
                canvas.axes.text(
                    skill.mean, kept.mean, str(row.rank), color="white", fontsize=6, weight="bold", ha="center",
                    va="center_baseline", zorder=6,
                )  # fmt: skip
        low, high = canvas.axes.get_ylim()
        if high - low < LEAST_HEIGHT:  # differences of single items are not to look like mountains
            canvas.axes.set_ylim((low + high - LEAST_HEIGHT) / 2, (low + high + LEAST_HEIGHT) / 2)
        canvas.axes.set_xlabel(f"new skill: {name_of(metric)}")
        canvas.axes.set_ylabel("old skills: retention")

    title = "New skill against old ones" + (f", joined along {knob}" if knob and len(knob) < 16 else "")
    return Chart("skill_and_retention", "skill", title, draw, HEIGHT_IN * 1.25, _legend(result, colours))


def _legend(result: FieldResult, colours: dict[str, str]) -> dict[str, str]:
    named = {f"{row.rank}  {row.setting.label}": colours[row.setting.label] for row in result.rows}
    kept = {label: colour for label, colour in named.items() if colour != REST}
    return kept | ({"the others": REST} if len(kept) < len(named) else {})


def _curves(comparison: Comparison, result: FieldResult) -> pd.DataFrame:
    """The curves of the field's runs with their setting, on at most so many points a run."""
    of_run = {run: row.setting.label for row in result.rows for run in row.setting.runs.values()}
    curves = comparison.found.curves
    curves = curves[curves["run"].isin(of_run)]
    seconds = "time/total_s" if "time/total_s" in curves else "time/wall_s"
    names = [result.metrics[0], "reward", *HEALTH, *TIMES, "tokens/generated", seconds]
    curves = curves[["run", "step", *(name for name in dict.fromkeys(names) if name in curves)]].copy()
    if curves.empty:
        return curves
    width = max(1.0, curves["step"].max() / MOST_POINTS)
    if seconds in curves:
        curves = curves.rename(columns={seconds: "seconds"})
    bins = np.ceil(curves["step"] / width).astype(int)
    curves = curves.groupby(["run", bins.rename("bin")], as_index=False, observed=True).mean()
    return curves.assign(setting=curves["run"].astype(str).map(of_run))


def _has_curve(curves: pd.DataFrame, name: str) -> bool:
    return name in curves and curves.loc[curves[name].notna(), "bin"].nunique() > 2


def _learning(
    result: FieldResult,
    curves: pd.DataFrame,
    name: str,
    axis: str,
    colours: dict[str, str],
    *,
    section: str = "curves",
    words: str | None = None,
) -> Chart:
    words = words or name_of(name)

    def draw(canvas: Canvas) -> None:
        known = curves[curves[name].notna() & curves[axis].notna()]
        groups = dict(iter(known.groupby("setting")))
        thin = known["run"].nunique() <= MOST_THIN
        for row in reversed(result.rows):
            colour, group = colours[row.setting.label], groups.get(row.setting.label)
            if group is None or (row.rank > MOST_ROWS and colour == REST):
                continue
            if thin or colour != REST:
                for _, run in list(group.groupby("run", observed=True))[:8]:
                    canvas.axes.plot(run[axis], run[name], color=colour, lw=0.5, alpha=0.45, zorder=2)
            # Where a run ended earlier than others, the mean over those that are left would jump.
            mean = group.groupby("bin")[[axis, name]].agg(["mean", "count"])
            mean = mean[mean[name, "count"] == mean[name, "count"].max()]
            bold = 1.1 if colour == REST else 2.0
            canvas.axes.plot(mean[axis, "mean"], mean[name, "mean"], color=colour, lw=bold, zorder=2 if bold < 2 else 4)
        canvas.axes.set_xlabel(AXES[axis][1])
        canvas.axes.set_ylim(*_limits(known[name]))

    file = f"{section}_{name}_{axis}".replace("/", "_")
    title = f"{words} {AXES[axis][0]}"
    return Chart(file, section, title[0].upper() + title[1:], draw, HEIGHT_IN, _legend(result, colours))


def _limits(values: "pd.Series[float]") -> tuple[float, float]:
    """Without the one outlier in two hundred that would press everything else flat."""
    low, high = np.quantile(values, [0.005, 0.995])
    room = 0.06 * (high - low) or 0.5
    return float(low - room), float(high + room)


def _effect(result: FieldResult, effect: Effect) -> Chart:
    values = list(effect.by_value)
    numeric = all(number(value) is not None for value in values)

    def draw(canvas: Canvas) -> None:
        for seed in effect.by_value[values[0]]:
            ours = [effect.by_value[value][seed] for value in values]
            canvas.axes.plot(range(len(values)), ours, color=COLOURS[0], lw=0.6, alpha=0.5, zorder=2)
            for place, y in enumerate(ours):
                canvas.dot(place, y, COLOURS[0], f"{effect.key}={values[place]} seed={seed}: {figure(y)}", size=4)
        means = [float(np.mean(list(effect.by_value[value].values()))) for value in values]
        canvas.axes.plot(range(len(values)), means, "-o" if numeric else "o", color=INK, lw=2, ms=5, zorder=4)
        canvas.axes.set_xticks(
            range(len(values)), [value[:14] for value in values], rotation=0 if len(values) < 6 else 35
        )
        canvas.axes.set_xlim(-0.5, len(values) - 0.5)
        canvas.axes.set_xlabel(f"{effect.key}" + (f", mean of {effect.cells} settings" if effect.cells > 1 else ""))
        canvas.axes.set_ylabel(name_of(effect.metric))

    file = f"effect_{effect.metric}_{effect.key}".replace("/", "_")
    return Chart(file, "effects", f"{name_of(effect.metric)} by {effect.key}", draw, HEIGHT_IN * 0.85)


def _classes(result: FieldResult, knob: str) -> dict[str, str]:
    """Of each value of a key the row or column of a heat map that it is in, in order.

    Many numbers, as a search draws them, are put together into classes of equally many; of many words those of the best
    settings are shown.
    """
    values = list(dict.fromkeys(row.setting.values[knob] for row in result.rows))
    if len(values) > MOST_VALUES and all(number(value) is not None for value in values):
        parts = np.array_split(sorted(values, key=float), CLASSES)
        return {value: f"{float(part[0]):.2g} to {float(part[-1]):.2g}" for part in parts for value in part}
    shown = sorted(values[:MOST_VALUES], key=lambda text: (number(text) is None, number(text) or 0.0, text))
    return {value: value for value in shown}


def _heat(result: FieldResult, first: str, second: str) -> Chart:
    metric = result.metrics[0]
    columns, lines = _classes(result, first), _classes(result, second)
    across, down = list(dict.fromkeys(columns.values())), list(dict.fromkeys(lines.values()))
    cells: dict[tuple[str | None, str | None], list[float]] = {}
    for row in result.rows:
        key = lines.get(row.setting.values[second]), columns.get(row.setting.values[first])
        cells.setdefault(key, []).append(row.levels[metric].mean)
    grid = np.array([[np.mean(cells.get((y, x), [np.nan])) for x in across] for y in down])

    def draw(canvas: Canvas) -> None:
        canvas.axes.grid(False)
        mesh = canvas.axes.pcolormesh(np.ma.masked_invalid(grid), cmap="viridis", edgecolors=GRID, lw=0.5)
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for place, value in np.ndenumerate(grid):
            if np.isfinite(value) and grid.size <= 64:
                colour = "black" if value > middle else "white"
                canvas.axes.text(place[1] + 0.5, place[0] + 0.5, figure(value), color=colour, ha="center", va="center")
        turned: dict[str, Any] = {"rotation": 35, "ha": "right"} if max(map(len, across)) > 8 else {}
        canvas.axes.set_xticks(np.arange(len(across)) + 0.5, across, **turned)
        canvas.axes.set_yticks(np.arange(len(down)) + 0.5, down)
        canvas.axes.set_xlabel(first)
        canvas.axes.set_ylabel(second)
        mesh.set_gid("heat")

    title = f"{name_of(metric)} by {first} and {second}"
    return Chart(f"heat_{first}_{second}".replace("/", "_"), "effects", title, draw, HEIGHT_IN * 0.85)


def _times(result: FieldResult, curves: pd.DataFrame) -> Chart:
    names = [name for name in TIMES if name in curves]
    rows = _shown_rows(result)
    means = curves.groupby("setting")[names].mean()

    def draw(canvas: Canvas) -> None:
        for place, row in enumerate(rows):
            start = 0.0
            for name, colour in zip(names, COLOURS):
                seconds = float(np.nan_to_num(means.at[row.setting.label, name]))
                canvas.axes.barh([place], [seconds], left=start, height=0.3, color=colour)
                start += seconds
        _name_lines(canvas, [row.setting.label for row in rows])
        canvas.axes.set_xlabel("seconds a step: " + ", ".join(name[5:-2] for name in names))

    legend = {name.removeprefix("time/").removesuffix("_s"): colour for name, colour in zip(names, COLOURS)}
    return Chart("health_time", "health", "Where a step's time goes", draw, _line_height(len(rows)), legend)
