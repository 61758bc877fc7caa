"""The report as files: a page, JSON, CSV, Markdown and pictures."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import pandas as pd

from selfdistill.comparison import tables
from selfdistill.comparison.analysis import ACCURACY, Claim, Comparison, FieldResult, compare
from selfdistill.comparison.reading import RunSet, load_runs
from selfdistill.comparison.settings import label
from selfdistill.comparison.wording import all_text, is_decided, name_of, ordered, sentence, together, verdict
from selfdistill.errors import UserError
from selfdistill.files import write_atomically

# Rows of runs on the page, which stays under 500 kB; report.csv has all of them.
MOST_RUNS = 300
MOST_PICTURES = 380_000  # characters of pictures before their styles are shared; all of them lie in plots/
MOST_SENTENCES = 100  # of each kind on the page; report.json has all
MOST_CLAIMS = 8  # sentences of each kind that are seen at once; the others unfold


def report(
    *paths: str | Path,
    folder: str | Path | None = None,
    metric: str = ACCURACY,
    baseline: str | Mapping[str, Any] | None = None,
    by: Sequence[str] = (),
    force: bool = False,
) -> tuple[Comparison, Path]:
    """Compare the runs in these folders and write report.html, .json, .csv, .md and plots/*.png.

    Args:
        paths: runs' folders, folders of sweeps, or globs.
        folder: where the report goes; `report/` in the first path where that is a sweep's folder, beside it where that
            is a run's, and of a glob in the folder that it starts from, above its first wildcard.
        metric, baseline, by, force: see `compare`.

    Returns:
        what was found, and the folder of the report.

    Raises:
        UserError: there are no runs, none of them finished, or an argument fits none of them.
    """
    found = load_runs(*paths)
    comparison = compare(found, metric=metric, baseline=baseline, by=by, force=force)
    place = Path(folder) if folder is not None else _place(found, paths[0])
    chosen = {"baseline": baseline, "by": ",".join(by), "metric": metric if metric != ACCURACY else "", "force": force}
    options = [f"{key}={str(value).lower() if value is True else value}" for key, value in chosen.items() if value]
    try:
        write(comparison, place, shlex.join(["python", "-m", "selfdistill.compare", *map(str, paths), *options]))
    except OSError as error:
        raise UserError(f"{place}: the report cannot be written: {error.strerror or error}.") from error
    return comparison, place


def _place(found: RunSet, first: str | Path) -> Path:
    path = Path(first).absolute()
    if not path.is_dir():
        path = next(above for above in path.parents if not re.search(r"[*?[]", str(above)))
    elif str(path) in found.runs.index:
        path = path.parent
    return path / "report"


def write(comparison: Comparison, folder: Path, command: str | None = None) -> None:
    """Write the report of a comparison into a folder; it says which command makes it again."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for old in (folder / "plots").glob("*.png"):
        old.unlink()
    runs = tables.runs_table(comparison)
    write_atomically(folder / "report.json", _json(comparison, runs))
    write_atomically(folder / "report.csv", runs.to_csv(index_label="folder"))
    pictures, legends, names = _pictures(comparison, folder / "plots")
    write_atomically(folder / "report.md", _markdown(comparison, runs, names))
    write_atomically(folder / "report.html", _page(comparison, runs, pictures, legends, command))


def _json(comparison: Comparison, runs: pd.DataFrame) -> str:
    value = {
        "metric": comparison.metric,
        "text": all_text(comparison),
        "fields": [
            {
                "conditions": result.field.conditions,
                "keys": result.field.knobs,
                "averaged_over": result.field.over,
                "baseline": result.baseline.label,
                "settings": [
                    {
                        "rank": row.rank,
                        "values": row.setting.values,
                        "metrics": {
                            metric: asdict(level) | {"units": None, "by_seed": level.by_seed}
                            for metric, level in row.levels.items()
                        },
                    }
                    for row in result.rows
                ],
                "claims": [_claim(claim) for claim in (*result.best, *result.keys, *result.claims)],
                "effects": [asdict(effect) for effect in result.effects],
            }
            for result in comparison.fields
        ],
        "runs": runs.reset_index(names="folder").to_dict("records"),
        "left_out": tables.left_out_table(comparison).to_dict("records"),
        "alarms": tables.alarm_messages(comparison),
        "origin": tables.origin(comparison),
    }
    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    return orjson.dumps(value, option=options, default=str).decode() + "\n"


def _claim(claim: Claim) -> dict[str, Any]:
    decided = {"decided": claim.difference.is_decided, "decided_among_all": claim.difference.is_decided_among_all}
    return {"sentence": sentence(claim), **decided, **asdict(claim)}


def _pictures(
    comparison: Comparison, folder: Path
) -> tuple[dict[str, list[str]], dict[str, dict[str, str]], list[tuple[str, str]]]:
    """The pictures of each part as SVG, their legends, and the PNGs' names with their titles."""
    from selfdistill.comparison.charts import charts
    from selfdistill.comparison.drawing import THEME, render

    pictures: dict[str, list[str]] = {}
    legends: dict[str, dict[str, str]] = {}
    names = []
    size = 0
    for chart in charts(comparison) if comparison.fields else ():
        svg = render(chart, folder)
        size += len(svg)
        if size < MOST_PICTURES:
            pictures.setdefault(chart.section, []).append(svg)
        if chart.section != "health":
            legends.setdefault(chart.section, {label: THEME[colour] for label, colour in chart.legend.items()})
        elif chart.name == "health_time":
            legends["health"] = {label: THEME[colour] for label, colour in chart.legend.items()}
        names.append((chart.name, chart.title))
    return pictures, legends, names


def _markdown(comparison: Comparison, runs: pd.DataFrame, names: Sequence[tuple[str, str]]) -> str:
    parts = [f"# {_title(comparison)}", *(f"- {line}" for line in all_text(comparison))]
    for result in comparison.fields:
        parts += [f"\n## Settings {label(result.field.conditions) if result.field.conditions else ''}".rstrip()]
        parts += [_markdown_table(tables.settings_table(result))]
    parts += ["\n## Runs", _markdown_table(_texts(runs))]
    parts += [f"\n![{title}](plots/{name}.png)" for name, title in names]
    for result in comparison.fields[:1]:
        parts += ["\n## Health", _markdown_table(tables.health_table(comparison, result))]
        parts += [f"- {alarm}" for alarm in tables.alarm_messages(comparison)]
    parts += ["\n## Left out", _markdown_table(tables.left_out_table(comparison)), "\n## Where the numbers come from"]
    parts += [f"- {what}: `{text}`" for what, texts in tables.origin(comparison).items() for text in texts]
    return "\n".join(parts) + "\n"


def _markdown_table(table: pd.DataFrame) -> str:
    if table.empty:
        return "\nNone."
    lines = [list(map(str, table.columns)), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n" + "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _page(
    comparison: Comparison,
    runs: pd.DataFrame,
    pictures: dict[str, list[str]],
    legends: dict[str, dict[str, str]],
    command: str | None,
) -> str:
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    result = comparison.fields[0] if comparison.fields else None
    head, sure, why = verdict(result) if result else ("No run finished.", "There is nothing to compare.", "")
    suites = [name for name in runs if str(name).startswith("eval/retention/")]
    shown = _texts(runs.drop(columns=suites))
    unfinished = shown[shown["status"] != "finished"]
    finished = shown[shown["status"] == "finished"]
    cut = max(MOST_RUNS - len(unfinished), MOST_RUNS // 2)
    listed = pd.concat([finished.head(cut), unfinished.head(MOST_RUNS // 2)])
    count = f"{len(runs)} runs" + (
        f", of which {len(listed)} are shown; report.csv has all" if len(listed) < len(runs) else ""
    )
    small, styles = _shared_styles(pictures)
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template(
        "page.html.jinja"
    )
    return template.render(
        title=_title(comparison),
        head=head,
        sure=sure,
        why=why,
        decided=result is not None and is_decided(result),
        notes=comparison.notes,
        claim_groups=[group for one in comparison.fields for group in _claim_groups(one, len(comparison.fields) > 1)],
        together=together(result) if result else "",
        settings=Markup("".join(_html_table(tables.settings_table(one)) for one in comparison.fields)),
        runs=Markup(_html_table(listed)),
        runs_note=f"{count}. Settings are compared with the baseline {result.baseline.label} ({result.baseline_why})."
        if result
        else f"{count}.",
        pictures={part: [Markup(svg) for svg in svgs] for part, svgs in small.items()},
        legends=legends,
        health=Markup(_html_table(tables.health_table(comparison, result)) if result else ""),
        alarms=tables.alarm_messages(comparison)[:12],
        left_out=Markup(_html_table(tables.left_out_table(comparison).head(200))),
        origin=tables.origin(comparison),
        styles=Markup(styles),
        command=command,
        version=version("selfdistill"),
    )


def _title(comparison: Comparison) -> str:
    runs = comparison.found.runs
    counts = ", ".join(f"{count} {status}" for status, count in runs["status"].value_counts().items())
    groups = runs["group"].dropna().unique() if "group" in runs else []
    return f"{groups[0] if len(groups) == 1 else 'Comparison'}: {len(runs)} runs ({counts})"


def _claim_groups(result: FieldResult, several: bool) -> list[dict[str, Any]]:
    """The sentences, those of what is decided first."""
    where = f"Runs with {label(result.field.conditions)}. " if several else ""
    base = f"{where}Each setting against the baseline {result.baseline.label} ({result.baseline_why})"
    named = [
        (f"{where}What each key does, the others held equal", result.keys, MOST_CLAIMS),
        (base, result.claims, MOST_CLAIMS),
        (f"{where}The best setting against each other one", result.best, 0),
    ]
    groups = []
    for title, claims, shown in named:
        lines = [
            {"text": sentence(one), "decided": one.difference.is_decided} for one in ordered(claims)[:MOST_SENTENCES]
        ]
        if len(lines) < len(claims):
            title += f"; {len(lines)} of {len(claims)} sentences, report.json has all"
        groups += [{"title": title, "claims": lines, "shown": shown}] if lines else []
    return groups


def _texts(runs: pd.DataFrame) -> pd.DataFrame:
    """Short texts for people."""
    table = runs.copy()
    for column in table:
        if pd.api.types.is_float_dtype(table[column]):
            digits = ".0f" if column in ("wall_s", "seed") else ".3f"
            table[column] = [("" if pd.isna(value) else format(value, digits)) for value in table[column]]
    table = table.rename(columns=lambda name: name_of(str(name)).removeprefix("eval/"))
    return table.fillna("").astype(str)


def _html_table(table: pd.DataFrame) -> str:
    if table.empty:
        return "<p class=note>Nothing.</p>"
    wide = [column for column in table if column in ("reason", "why", "what")]
    head = "".join(f"<th>{escape(str(column))}" for column in table)
    rows = []
    for line in table.to_dict("records"):
        cells = (
            f"<td{' class=w' if key in wide and value else ''}>{escape(str(value))}" for key, value in line.items()
        )
        rows.append(f"<tr>{''.join(cells)}")
    return f"<div class=scroll><table><thead><tr>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


def _shared_styles(pictures: Mapping[str, Sequence[str]]) -> tuple[dict[str, list[str]], str]:
    """Pictures whose styles are classes, which all of them share: half the size."""
    classes: dict[str, str] = {}

    def as_class(match: re.Match[str]) -> str:
        return f'class="{classes.setdefault(match[1], f"k{len(classes)}")}"'

    small = {part: [re.sub(r'style="([^"]*)"', as_class, svg) for svg in svgs] for part, svgs in pictures.items()}
    return small, "".join(f".{name}{{{style}}}" for style, name in classes.items())
