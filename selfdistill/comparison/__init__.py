"""Runs compared: read their folders, sort them into settings, say what is decided and how surely, and write it down.

    from selfdistill.comparison import compare, load_runs, report

    runs = load_runs("outputs/multirun/20261121-101500")   # .runs, .configs, .curves and .items are data frames
    result = compare(runs, baseline="alpha=0")             # .fields[0].rows, .claims, .effects
    report("outputs/multirun/20261121-101500")             # writes report.html, .json, .csv, .md and plots/

Nothing here imports torch.
"""

from selfdistill.comparison.analysis import Comparison, compare
from selfdistill.comparison.reading import RunSet, load_runs
from selfdistill.comparison.wandb_runs import load_wandb
from selfdistill.comparison.writing import report, write

__all__ = ["Comparison", "RunSet", "compare", "load_runs", "load_wandb", "report", "write"]
