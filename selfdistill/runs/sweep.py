"""Sweeps (--multirun): every job is checked before the first one starts, one that fails stops no other, and the end is a table.

`jobs.jsonl` in the sweep's folder has a line for each job, whatever launched it: number, overrides, status, run, message.
"""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from selfdistill.config import COMPOSITION_ERRORS, check, explain, fail
from selfdistill.errors import UserError

JOBS = "jobs.jsonl"
GOOD = ("finished", "stopped", "checked")
_folder: Path | None = None  # of the sweep that this process started


class Job:
    """One run of this process; `folder` is its RunFolder as soon as there is one."""

    folder: Any = None


class CheckSweep(Callback):
    """Composes and checks every job of a sweep before the first one starts, so that a bad one stops it at once."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global _folder
        _folder = Path(config.hydra.sweep.dir).absolute()
        if not str(config.hydra.sweeper._target_).endswith(".BasicSweeper"):
            return  # an adaptive sweeper decides as it goes; each of its jobs is checked when it starts
        # An ordinary exception would be turned into a warning by Hydra.
        try:
            jobs = check_jobs(config)
        except (UserError, *COMPOSITION_ERRORS) as error:
            raise SystemExit(fail(explain(error))) from None
        if config.check:
            rows = [
                {"job": number, "overrides": overrides, "status": "checked"} for number, overrides in enumerate(jobs)
            ]
            _print_table(rows, f"{len(rows)} jobs checked: nothing was loaded or written")
            raise SystemExit(0)


def overrides_of(hydra_config: Any) -> list[str]:
    """The command line's keys as they were written: an interpolation in one is for the run to resolve, not for Hydra."""
    return [str(override) for override in OmegaConf.to_container(hydra_config.overrides.task, resolve=False)]  # type: ignore[union-attr]


def check_jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of every job of a grid, once all are composed and checked.

    Raises:
        UserError: the first job that cannot be meant.
    """
    from hydra import compose
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*given, *overrides_of(config.hydra)])
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    runs = [check(compose(config.hydra.job.config_name, list(job)), list(job)) for job in jobs]

    from selfdistill.config.targets import check_targets
    from selfdistill.training.arguments import ARGUMENTS  # imports torch and trl: after the checks that need neither

    for run in runs:
        check_targets(run, ARGUMENTS)
    return [list(job) for job in jobs]


@contextmanager
def job(cfg: DictConfig) -> Iterator[Job]:
    """Around one run. A mistake ends the command with its message; within a sweep it ends the job alone and is written down."""
    this = Job()
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        try:
            yield this
        except (UserError, *COMPOSITION_ERRORS) as error:
            raise SystemExit(fail(explain(error))) from None  # not through Hydra, which would add a line of its own
        return
    if cfg.group is None:
        from selfdistill.runs.loggers import multirun_group

        cfg.group = multirun_group()
    status, message = "failed", None
    try:
        yield this
        status = "finished"
    except (UserError, *COMPOSITION_ERRORS) as error:
        message = explain(error)
        fail(f"job {HydraConfig.get().job.num}: {message}")
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    except BaseException:
        status = "interrupted"
        raise
    finally:
        status = _write(this, status, message)
    if status == "interrupted":
        raise SystemExit(130)  # a signal is meant for the whole sweep


def _write(this: Job, status: str, message: str | None) -> str:
    hydra_config = HydraConfig.get()
    line: dict[str, Any] = {"job": hydra_config.job.num, "overrides": overrides_of(hydra_config)}
    if this.folder is not None and not this.folder.path.exists():
        status = "refused"  # before it began
    elif this.folder is not None:
        status = this.folder.summary.get("status", status)
        after = (this.folder.summary.get("eval") or {}).get("after") or {}
        line |= {"run": str(this.folder.path), "accuracy": after.get("eval/accuracy")}
    line |= {"status": status, "message": message}
    with (Path(hydra_config.sweep.dir) / JOBS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return status


@contextmanager
def reported() -> Iterator[None]:
    """Around a whole command: after a sweep the table of its jobs, and exit code 1 where one of them failed."""
    global _folder
    _folder = None
    try:
        yield
    finally:
        rows = _jobs(_folder)
        if rows:
            _print_table(rows, f"{len(rows)} jobs, written to {_folder}")
    if any(row["status"] not in GOOD for row in rows):
        raise SystemExit(1)


def _jobs(folder: Path | None) -> list[dict[str, Any]]:
    file = folder / JOBS if folder else None
    if file is None or not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: row["job"])


def _print_table(rows: list[dict[str, Any]], title: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from selfdistill.runs import console

    same = set.intersection(*(set(row["overrides"]) for row in rows)) if len(rows) > 1 else set()
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("job", "overrides", "status", "accuracy", "run, or why not"):
        table.add_column(column, overflow="fold")
    for row in rows:
        accuracy = row.get("accuracy")
        table.add_row(
            str(row["job"]),
            Text(" ".join(override for override in row["overrides"] if override not in same)),
            row["status"],
            "" if accuracy is None else f"{accuracy:.3f}",
            Text(Path(row["run"]).name if row.get("run") else row.get("message") or ""),
        )
    screen = console.make_console()
    screen.print(table)
    sys.stdout.flush()
