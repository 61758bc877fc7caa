"""The report's tables as data frames: settings, runs, health, what was left out, and where the numbers come from."""

from collections import Counter
from typing import Any

import pandas as pd

from selfdistill.comparison import statistics
from selfdistill.comparison.analysis import ACCURACY, Comparison, FieldResult
from selfdistill.comparison.settings import label, shown
from selfdistill.comparison.wording import figure, name_of, span

LAST_SHARE = 0.1
HEALTH = {
    "monitor/entropy": "entropy at the end, nats",
    "monitor/length_tokens": "length at the end, tokens",
    "monitor/sampler_gap": "sampler/trainer gap, nats",
    "time/generate_s": "generate, s a step",
    "time/reward_s": "reward, s a step",
    "time/teacher_s": "teacher, s a step",
    "time/update_s": "update, s a step",
}


def settings_table(result: FieldResult) -> pd.DataFrame:
    """One row a setting, the best first, with the probability that a run of it is above one of the baseline."""
    rows, metric = [], result.metrics[0]
    for row in result.rows:
        line: dict[str, Any] = {"rank": str(row.rank)}
        line |= row.setting.values or {"setting": row.setting.label}
        line["seeds"] = str(len(next(iter(row.levels.values())).by_seed))
        for name, level in row.levels.items():
            line[name_of(name)] = f"{figure(level.mean)} {span(level.interval)}".strip()
            if level.iqm is not None:
                line[f"{name_of(name)}, interquartile mean"] = f"{figure(level.iqm)} {span(level.iqm_interval)}"
        claim = next((one for one in result.claims if one.first == row.setting.label and one.metric == metric), None)
        ahead = "" if claim is None or claim.improvement is None else f"{claim.improvement:.2f}"
        line["share of pairs above the baseline"] = "baseline" if row.setting is result.baseline else ahead
        rows.append(line)
    return pd.DataFrame(rows).fillna("")


def runs_table(comparison: Comparison) -> pd.DataFrame:
    """One row a run, with only the keys that differ; those that count first, in the order of their settings."""
    found = comparison.found
    place: dict[str, tuple[int, int]] = {}
    for number, result in enumerate(comparison.fields):
        for row in result.rows:
            place |= dict.fromkeys(row.setting.runs.values(), (number, row.rank))
    left_out = {one["run"]: one["why"] for one in comparison.sorted.left_out}
    metrics = [name for name in found.runs if str(name).startswith("eval/") and found.runs[name].notna().any()]
    metrics = list(dict.fromkeys([comparison.metric, *metrics]))
    table = pd.DataFrame(index=found.runs.index)
    table["run"] = found.runs["run_id"]
    for knob in comparison.sorted.knobs:
        table[knob] = comparison.sorted.shown[knob]
    for name in ("seed", "status"):
        table[name] = found.runs[name]
    table["reason"] = [left_out.get(str(run), "") for run in table.index]
    for name in metrics:
        if name in found.runs:
            table[name] = found.runs[name]
    if ACCURACY in metrics:
        intervals = [_item_interval(comparison, str(run)) for run in table.index]
        if any(interval is not None for interval in intervals):
            table["items"] = [len(found.verdicts(str(run))) for run in table.index]
            table["wilson_low"] = [interval.low if interval else None for interval in intervals]
            table["wilson_high"] = [interval.high if interval else None for interval in intervals]
    for name in ("wall_s", "peak_memory_gib"):
        if name in found.runs:
            table[name] = found.runs[name]
    table["alarms"] = [len(alarms) if isinstance(alarms, list) else 0 for alarms in found.runs.get("alarms", [])]
    order = sorted(
        table.index, key=lambda run: (*place.get(run, (len(comparison.fields), 0)), str(table.at[run, "seed"]))
    )
    return table.loc[order]


def _item_interval(comparison: Comparison, run: str) -> statistics.Interval | None:
    verdicts = comparison.found.verdicts(run)
    return statistics.wilson(int(verdicts.sum()), len(verdicts)) if len(verdicts) else None


def health_table(comparison: Comparison, result: FieldResult) -> pd.DataFrame:
    """One row a setting: its alarms, the last tenth of its curves, memory."""
    curves = comparison.found.curves
    names = [name for name in HEALTH if name in curves]
    last = curves["step"] > (1 - LAST_SHARE) * curves.groupby("run", observed=True)["step"].transform("max")
    means = curves.loc[last, ["run", *names]].groupby("run", observed=True).mean()
    rows = []
    for row in result.rows:
        runs = list(row.setting.runs.values())
        line: dict[str, Any] = {"rank": str(row.rank), "setting": row.setting.label}
        alarms = Counter(alarm["monitor"] for run in runs for alarm in comparison.found.runs.at[run, "alarms"])
        line["alarms"] = ", ".join(f"{monitor} in {count}" for monitor, count in alarms.items()) or "none"
        for name in names:
            value = means[name].reindex(runs).mean()
            line[HEALTH[name]] = "" if pd.isna(value) else f"{value:.3g}"
        peak = comparison.found.runs.loc[runs, "peak_memory_gib"].max()
        line["peak memory, GiB"] = "" if pd.isna(peak) else f"{peak:.3g}"
        rows.append(line)
    return pd.DataFrame(rows)


def alarm_messages(comparison: Comparison) -> list[str]:
    """The first message of each monitor that raised an alarm, and in how many runs it did."""
    seen: dict[str, list[str]] = {}
    for _, row in comparison.found.runs.iterrows():
        for alarm in row["alarms"] if isinstance(row["alarms"], list) else []:
            seen.setdefault(alarm["monitor"], []).append(f"{row['run_id']}, step {alarm['step']}: {alarm['message']}")
    return [
        f"{messages[0]}" + (f" ({len(messages)} such alarms)" if len(messages) > 1 else "")
        for messages in seen.values()
    ]


def left_out_table(comparison: Comparison) -> pd.DataFrame:
    """Runs and pairs that were left out, and why."""
    runs = comparison.found.runs
    lines = [
        {"what": str(runs.at[one["run"], "run_id"]), "setting": _setting_of(comparison, one["run"]), "why": one["why"]}
        for one in comparison.sorted.left_out
    ]
    for result in comparison.fields:
        for one in result.field.missing:
            stratum, seed = one["unit"]
            over = dict(zip(result.field.over, stratum))
            pair = (
                "all pairs with the baseline" if one["setting"] == result.baseline.label else "pair with the baseline"
            )
            why = one["why"]
            lines.append({"what": pair, "setting": label({**over, "seed": seed}) + f", {one['setting']}", "why": why})
    for result in comparison.fields[1:]:
        what = f"{len(result.field.runs)} runs"
        why = "other data, evaluation, model or budget: compared among themselves; by=KEY or force=true compares them"
        lines.append({"what": what, "setting": label(result.field.conditions), "why": why})
    return pd.DataFrame(lines, columns=["what", "setting", "why"])


def _setting_of(comparison: Comparison, run: str) -> str:
    keys, seed = comparison.sorted.shown, comparison.found.runs.at[run, "seed"]
    values = {str(key): str(keys.at[run, key]) for key in keys} if run in keys.index else {}
    return label({**values, "seed": "" if pd.isna(seed) else shown(seed)})


def origin(comparison: Comparison) -> dict[str, list[str]]:
    """Versions, commits, machines and commands of the runs, each once, with the number of runs where they differ."""
    found: dict[str, Counter[str]] = {
        what: Counter() for what in ("commit", "versions", "machine", "command", "repeat")
    }
    for said in comparison.found.provenance.values():
        git = said.get("git") or {}
        if git.get("commit"):
            found["commit"][git["commit"] + (", with changes" if git.get("changed") or git.get("diff") else "")] += 1
        if said.get("versions"):
            found["versions"][", ".join(f"{name} {version}" for name, version in said["versions"].items())] += 1
        if said.get("host"):
            found["machine"][str(said["host"])] += 1
        if said.get("command"):
            found["command"][str(said["command"])] += 1
        if said.get("repeat") and not found["repeat"]:  # each run has one of its own
            found["repeat"][str(said["repeat"])] += 1
    return {
        what: [text if len(counts) == 1 else f"{text} ({count} runs)" for text, count in counts.most_common(20)]
        for what, counts in found.items()
        if counts
    }
