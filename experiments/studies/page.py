"""Writes into a study's page what `selfdistill.compare` says of its sweeps, between the marks that ask for it.

    python experiments/studies/page.py experiments/studies/grpo/README.md

A block, with a table, sentences, a picture, and all runs in results/NAME.csv:
    <!-- compare outputs/studies/grpo/rewards baseline='experiment=grpo_supervised' -->
    <!-- end -->
One claim within a sentence or a table, and whether it is the one that was expected:
    <!-- compare outputs/studies/grpo/rewards baseline='…' claim='experiment=…' expected=lower --> <!-- end -->
Options are those of the command, and
    claim      a setting, compared with the baseline; `baseline=start` is the model before the training
    metric     eval/accuracy, unless it is said
    expected   higher or lower
    where      conditions such as budget_s=5, where runs are compared among themselves
    stopped    a setting: in how many of its runs a monitor stopped the training, when, and what was left
What stands between marks whose sweep was not run, or not to its end, stays as it is.
"""

import argparse
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import pandas as pd

from selfdistill.comparison import Comparison, compare, load_runs, tables
from selfdistill.comparison.analysis import ACCURACY, RETENTION, Claim, FieldResult, Level, Row
from selfdistill.comparison.charts import charts
from selfdistill.comparison.drawing import render
from selfdistill.comparison.settings import label
from selfdistill.comparison.statistics import McNemar, differences, mcnemar
from selfdistill.comparison.wording import figure, name_of, ordered, sentence, span, together, verdict
from selfdistill.errors import UserError

MARK = re.compile(r"(<!-- compare (.*?) -->)(.*?)(<!-- end -->)", re.DOTALL)
PICTURE = "skill_and_retention"
MOST_SENTENCES = 8
METRICS = (ACCURACY, RETENTION)
OVER = ("finished", "stopped")
# Options of a mark that the command does not have, and all that there are.
START = "start"
OWN = ("claim", "metric", "expected", "where", "stopped")
KNOWN = ("baseline", "by", *OWN)


@dataclass(frozen=True)
class Asked:
    """What one mark asks for."""

    paths: list[str]
    options: dict[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        return self.options.get("metric", ACCURACY)

    @property
    def command(self) -> str:
        """The command that compares the same runs."""
        own = [f"{key}={shlex.quote(value)}" for key, value in self.options.items() if key not in OWN]
        return " ".join(["python -m selfdistill.compare", *self.paths, *own])


def asked(words: str) -> Asked:
    """Reads a mark.

    Raises:
        SystemExit: an option that there is not.
    """
    split = shlex.split(words)
    options = dict(word.partition("=")[::2] for word in split if "=" in word)
    if unknown := set(options) - set(KNOWN):
        raise SystemExit(
            f"<!-- compare {words} -->: no such option: {', '.join(unknown)}; there are {', '.join(KNOWN)}."
        )
    return Asked([word for word in split if "=" not in word], options)


def compared(mark: Asked) -> Comparison | None:
    """The runs, compared; None where one of the sweeps was not run, or not to its end."""
    try:
        found = load_runs(*mark.paths)
    except UserError:
        return None
    if not found.runs["status"].isin(OVER).all():
        return None
    by = [key for key in mark.options.get("by", "").split(",") if key]
    baseline = mark.options.get("baseline")
    return compare(found, baseline=None if baseline == START else baseline, by=by)


def one_claim(mark: Asked, comparison: Comparison) -> str:
    """The means of two settings, the claim's sentence, and whether it is the one that was expected.

    Raises:
        SystemExit: there is no such claim.
    """
    wanted, where = mark.options["claim"], mark.options.get("where")
    for result in comparison.fields:
        if where is not None and label(result.field.conditions) != where:
            continue
        claims = (
            against_start(result, mark.metric, comparison) if mark.options.get("baseline") == START else result.claims
        )
        for claim in claims:
            if (claim.first, claim.metric) == (wanted, mark.metric):
                return claimed(claim, result, mark.options.get("expected"))
    known = sorted({f"{claim.metric}: {claim.first}" for one in comparison.fields for claim in one.claims})
    raise SystemExit(f"claim={wanted!r} {mark.metric}: there is none; known: {'; '.join(known)}.")


def against_start(result: FieldResult, metric: str, comparison: Comparison) -> list[Claim]:
    """Each setting against the model as it was before the training."""
    runs = comparison.found.runs
    start = float(runs[f"before/{metric}"].dropna().mean())
    gaps = [[value - start for value in row.levels[metric].by_seed.values()] for row in result.rows]
    return [
        Claim("baseline", metric, row.setting.label, f"the start ({figure(start)})", difference, None, tests, len(gaps))
        for row, difference in zip(result.rows, differences(gaps), strict=True)
        for tests in [item_tests(row, comparison) if metric == ACCURACY else {}]
    ]


def item_tests(row: Row, comparison: Comparison) -> dict[str, McNemar]:
    """McNemar's tests of each run's answers after the training against those before it."""
    tests = {}
    for (_, seed), run in row.setting.runs.items():
        after, before = comparison.found.verdicts(run), comparison.found.verdicts(run, step=0)
        if len(after) and after.index.equals(before.index):
            tests[f"seed={seed}"] = mcnemar(after.to_numpy(), before.to_numpy())
    return tests


def claimed(claim: Claim, result: FieldResult, expected: str | None) -> str:
    """The means, the sentence, and whether it is what was expected."""
    means = [row.levels[claim.metric].mean for name in (claim.first, claim.second) for row in result.rows
             if row.setting.label == name]  # fmt: skip
    parts = [f"{name_of(claim.metric)} {' against '.join(map(figure, means))}: {sentence(claim)}"]
    if expected:
        parts.append(f"**{judged(claim, expected)}**")
    return " ".join(parts)


def stopped(mark: Asked, comparison: Comparison) -> str:
    """In how many runs of a setting a monitor stopped the training, and at which steps."""
    shown, runs = comparison.sorted.shown.astype(str), comparison.found.runs
    wanted = dict(part.partition("=")[::2] for part in mark.options["stopped"].split())
    of_setting = runs[(shown[list(wanted)] == wanted).all(axis=1)]
    said = []
    for _, run in of_setting.iterrows():
        last = next((alarm for alarm in reversed(run["alarms"]) if alarm["action"] == "stop"), None)
        if last is not None:
            left = ", ".join(
                f"{name_of(metric)} {figure(run[metric])}" for metric in METRICS if pd.notna(run.get(metric))
            )
            said.append(f"{last['monitor']} at step {last['step']}" + f" ({left} by then)" * bool(left))
    return f"{len(said)} of {len(of_setting)} runs were stopped: {'; '.join(said) or 'by no monitor'}."


def judged(claim: Claim, expected: str) -> str:
    """Whether the first setting is higher, or lower, as it was expected to be."""
    if not claim.difference.is_decided:
        alike = (
            claim.items and not claim.difference.shows_spread and all(test.p < 0.05 for test in claim.items.values())
        )
        if alike and (claim.difference.mean > 0) == (expected == "higher"):
            return "Holds for each of these runs, item by item."
        return "Not decided."
    if (claim.difference.mean > 0) == (expected == "higher"):
        return "Holds."
    return "Does not hold: it is the other way round."


def block(mark: Asked, comparison: Comparison, folder: Path) -> str:
    """The settings with every seed, what is claimed, what was left out, a picture, and where the runs are listed."""
    name = Path(mark.paths[0]).name
    (folder / "results").mkdir(exist_ok=True)
    tables.runs_table(comparison).to_csv(folder / "results" / f"{name}.csv", index=False, float_format="%.5g")
    parts = [f"```bash\n{mark.command}\n```"]
    for result in comparison.fields:
        if len(comparison.fields) > 1:
            parts.append(f"Runs with {label(result.field.conditions)}:")
        parts += [settings(result, comparison), "\n".join(f"- {line}" for line in said(result))]
    left = tables.left_out_table(comparison)
    left = left[~left["why"].str.startswith("other data")]
    if len(left):
        lines = list(dict.fromkeys(f"{one['setting']}: {one['why'].rstrip('.')}" for one in left.to_dict("records")))
        more = f"; and {len(lines) - MOST_SENTENCES} more" if len(lines) > MOST_SENTENCES else ""
        parts.append(f"Left out of the means: {'; '.join(lines[:MOST_SENTENCES])}{more}.")
    chart = next((chart for chart in charts(comparison) if chart.name == PICTURE), None)
    if chart is not None:
        chart.name = name
        render(chart, folder / "results")
        parts.append(f"![{chart.title}](results/{name}.png)")
    parts.append(f"{origin(comparison)} Every run: [results/{name}.csv](results/{name}.csv).")
    return "\n\n".join(parts)


def settings(result: FieldResult, comparison: Comparison) -> str:
    """A Markdown table: a line a setting, the best first, with every seed."""
    runs = comparison.found.runs
    head = ["setting"]
    for metric in result.metrics:
        head += [f"{name_of(metric)} by seed", "mean and 95% interval"]
    lines = [[*head, "s a run"]]
    lines.append(["---"] * len(lines[0]))
    for row in result.rows:
        cells = [f"`{row.setting.label}`"]
        for metric in result.metrics:
            cells += [
                by_seed(row.levels[metric]),
                f"{figure(row.levels[metric].mean)} {span(row.levels[metric].interval)}",
            ]
        lines.append([*cells, f"{median(runs.loc[list(row.setting.runs.values()), 'wall_s']):.0f}"])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    start = [f"{name_of(metric)} {figure(mean(runs[f'before/{metric}'].dropna()))}"
             for metric in METRICS if f"before/{metric}" in runs]  # fmt: skip
    return table + (f"\n\nBefore training: {', '.join(start)}." if start else "")


def by_seed(found: Level) -> str:
    return " ".join(figure(value) for value in found.by_seed.values())


def said(result: FieldResult) -> list[str]:
    """What is best, and how sure that is; what the keys do, or each setting against the baseline."""
    head, sure, _ = verdict(result)
    claims = result.keys or result.claims
    return [
        line for line in (f"{head} {sure}", *map(sentence, ordered(claims)[:MOST_SENTENCES]), together(result)) if line
    ]


def origin(comparison: Comparison) -> str:
    """When and with what the runs were made."""
    found, runs = tables.origin(comparison), comparison.found.runs
    days = sorted({str(started)[:10] for started in runs["started"].dropna()})
    seconds = runs["wall_s"].sum()
    commits = ", ".join(dict.fromkeys(text[:8] for text in found.get("commit", ())))
    versions = "; ".join(found.get("versions", ()))
    return f"{len(runs)} runs, {seconds / 60:.0f} minutes in all, {', '.join(days)}, commit {commits}, {versions}."


def write(page: Path) -> list[str]:
    """Fills the page's marks in; returns the sweeps that were not run to their end."""
    known: dict[str, Comparison | None] = {}
    missing: list[str] = []

    def filled(match: re.Match[str]) -> str:
        start, words, before, end = match.groups()
        mark = asked(words)
        if mark.command not in known:
            known[mark.command] = compared(mark)
        comparison = known[mark.command]
        if comparison is None:
            missing.extend(mark.paths)
            return str(match[0])
        if "claim" in mark.options:
            return f"{start} {one_claim(mark, comparison)} {end}"
        if "stopped" in mark.options:
            return f"{start} {stopped(mark, comparison)} {end}"
        return f"{start}\n{block(mark, comparison, page.parent)}\n{end}"

    text = MARK.sub(filled, page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
    return list(dict.fromkeys(missing))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+", help="README.md of a study")
    for page in parser.parse_args().pages:
        for path in write(page):
            print(f"{page}: {path} was not run to its end; what stands there is left as it is", file=sys.stderr)
