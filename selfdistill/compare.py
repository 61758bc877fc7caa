"""Compare runs: which setting is best, how sure that is, and what was left out.

    python -m selfdistill.compare outputs/SWEEP [baseline='alpha=0'] [by=alpha] [force=true]
    python -m selfdistill.compare outputs/RUN_1 outputs/RUN_2 'outputs/*-sdpo-*'

Folders of runs, folders of sweeps and globs. The report (report.html, .json, .csv, .md, plots/) lies in the sweep's
folder, or in output=FOLDER.
"""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from selfdistill.config import doors
from selfdistill.config.conf import CONF


@dataclass(frozen=True)
class CompareSettings:
    """Which runs are compared, and how; the keys of conf/compare.yaml, which explains them."""

    runs: Any  # a text or a list of texts
    baseline: Any  # a text or a mapping
    by: Any  # a text or a list of texts
    metric: str
    force: bool
    output: str | None


def run(cfg: DictConfig) -> None:
    """Compare, write the report, and say what it says."""
    settings = doors.typed(CompareSettings, cfg)

    from selfdistill.comparison import report
    from selfdistill.comparison.terminal import show

    comparison, folder = report(
        *doors.listed(settings.runs),
        folder=settings.output,
        metric=settings.metric,
        baseline=settings.baseline,
        by=doors.listed(settings.by),
        force=settings.force,
    )
    show(comparison, folder)


def main() -> None:
    doors.main(CONF / "compare.yaml", run, __doc__, words="runs")


if __name__ == "__main__":
    main()
