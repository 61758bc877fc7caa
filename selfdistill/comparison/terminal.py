"""The comparison on a terminal: what can be claimed, then the settings, then where the rest is."""

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfdistill.comparison import tables
from selfdistill.comparison.analysis import Comparison
from selfdistill.comparison.settings import label
from selfdistill.comparison.wording import sentences, together, verdict

MOST_CLAIMS = 10
MOST_ROWS = 40


def show(comparison: Comparison, folder: Path, console: Console | None = None) -> None:
    """Prints it; a terminal that is too narrow folds words instead of dropping columns."""
    console = console or Console(highlight=False, soft_wrap=False)
    if not comparison.fields:
        console.print("No run finished: there is nothing to compare.")
    for note in comparison.notes:
        console.print(Text(note))
    for result in comparison.fields:
        if result.field.conditions:
            console.print(Text(f"\nRuns with {label(result.field.conditions)}", style="bold"))
        head, sure, why = verdict(result)
        console.print(Text(f"{head}\n{sure}", style="bold"), Text(why), "", sep="\n")
        for line in _first(sentences(result.keys), "sentences on the keys") + _first(
            sentences(result.claims), "sentences on the settings"
        ):
            console.print(Text(f"- {line}"))
        if said := together(result):
            console.print(Text(said, style="dim"))
        console.print()
        _print(console, tables.settings_table(result))
    left_out = tables.left_out_table(comparison)
    if len(left_out):
        console.print(Text(f"\nLeft out ({len(left_out)})"))
        _print(console, left_out.head(12))
    console.print(Text(f"\n{folder / 'report.html'}, report.md, report.csv, report.json, plots/"), soft_wrap=True)


def _first(lines: list[str], what: str) -> list[str]:
    rest = len(lines) - MOST_CLAIMS
    return lines if rest <= 0 else [*lines[:MOST_CLAIMS], f"… {rest} more {what} in the report"]


def _print(console: Console, frame: pd.DataFrame) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in frame:
        table.add_column(str(column), overflow="fold")
    for line in frame.head(MOST_ROWS).astype(str).to_numpy().tolist():
        table.add_row(*map(Text, line))
    console.print(table)
    if len(frame) > MOST_ROWS:
        console.print(f"… {len(frame) - MOST_ROWS} more rows in the report")
