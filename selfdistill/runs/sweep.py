"""Sweeps (--multirun): all jobs are checked before the first starts, one that fails stops no other, a table ends it.

`jobs.jsonl` in the sweep's folder has a line for each job, whatever launched it: number, overrides, status, run and
message.
"""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from selfdistill.config import COMPOSITION_ERRORS, check, explain, fail
from selfdistill.config.secrets import without_secrets
from selfdistill.config.targets import check_targets
from selfdistill.errors import UserError, without_passwords
from selfdistill.files import write_atomically
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.preflight import look_for_files

JOBS = "jobs.jsonl"
GOOD = ("finished", "stopped", "checked")


class Job:
    """One run of this process; `folder` is its RunFolder as soon as there is one."""

    folder: RunFolder | None = None


class CheckSweep(Callback):
    """Checks every job of a sweep before the first one starts, and shows at the end what came of them."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Keeps Hydra from making `hydra.run.dir` before anything is checked: the run makes its folder itself."""
        with open_dict(config.hydra.run):
            config.hydra.run.folder = None if config.hydra.run.dir == "." else config.hydra.run.dir
            config.hydra.run.dir = "."

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Takes the secrets out of multirun.yaml, which Hydra's sweepers write before their first job."""
        file = Path(config.hydra.sweep.dir) / "multirun.yaml"
        overrides = overrides_of(config.hydra)
        if config.hydra.mode == RunMode.MULTIRUN and file.is_file() and without_secrets(overrides) != overrides:
            written = file.read_text(encoding="utf-8")
            for override, mask in zip(overrides, without_secrets(overrides), strict=True):
                written = written.replace(override, mask)
            write_atomically(file, without_passwords(written))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Composes and checks every job, so that a bad one stops the sweep at once; `check=true` ends it here.

        An adaptive sweeper decides as it goes: each of its jobs is checked when it starts.
        """
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        # An ordinary exception would be turned into a warning by Hydra.
        try:
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise UserError(
                    "--multirun is for one process: each of several would choose and number the jobs by itself. Start "
                    "it without torchrun or accelerate, or launch the runs one after the other."
                )
            if not config.check and (Path(config.hydra.sweep.dir) / JOBS).exists():
                folder = config.hydra.sweep.dir
                raise UserError(f"hydra.sweep.dir={folder} holds a sweep already: name another folder.")
            _name_by_swept_keys(config)
            jobs = check_jobs(config) if issubclass(get_class(config.hydra.sweeper._target_), BasicSweeper) else None
        except (UserError, *COMPOSITION_ERRORS) as error:
            raise SystemExit(fail(explain(error))) from None
        if config.check and jobs is not None:
            rows = [
                {"job": number, "overrides": overrides, "status": "checked"} for number, overrides in enumerate(jobs)
            ]
            _print_table(rows, f"{len(rows)} jobs checked: nothing was loaded or written")
            raise SystemExit(0)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints the table of the jobs; the exit code is 1 where one of them failed."""
        if not print_jobs(Path(config.hydra.sweep.dir).absolute()):
            raise SystemExit(1)


def overrides_of(hydra_config: Any) -> list[str]:
    """The command line's keys as they were written: the run resolves an interpolation in one, Hydra cannot."""
    written: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return [str(override) for override in written]


def _name_by_swept_keys(config: DictConfig) -> None:
    """Leaves what all jobs share out of `hydra.job.override_dirname`, by which a logger names a job."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = OverridesParser.create().parse_overrides(overrides_of(config.hydra))
    shared = [override.key_or_group for override in given if not override.is_sweep_override()]
    names = OmegaConf.to_container(config.hydra.job.config.override_dirname.exclude_keys)
    excluded = ",".join(f"'{key}'" for key in [*names, *shared])  # type: ignore[misc]
    settings = "hydra.job.config.override_dirname"
    config.hydra.overrides.hydra += [f"{settings}.exclude_keys=[{excluded}]", f"{settings}.item_sep=' '"]


def check_jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of every job of a grid, once all are composed and checked.

    Raises:
        UserError: the first job whose configuration is refused.
    """
    from hydra import compose
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    # glob(…) looks for options
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides([*given, *overrides_of(config.hydra)])
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    runs = [check(compose(config.hydra.job.config_name, list(job)), list(job)) for job in jobs]
    for run in runs:
        look_for_files(run)

    from selfdistill.training.arguments import ARGUMENTS  # imports torch and trl, which takes seconds

    for run in runs:
        check_targets(run, ARGUMENTS)
    return [list(job) for job in jobs]


@contextmanager
def job(cfg: DictConfig) -> Iterator[Job]:
    """The context of one run. Within a sweep a failure ends this job alone, and stands in the sweep's table."""
    this = Job()
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        yield this
        return
    if cfg.group is None:
        cfg.group = "-".join(Path(hydra_config.sweep.dir).parts[-2:])
    status, message = "failed", None
    try:
        yield this
        status = "finished"
    except (UserError, *COMPOSITION_ERRORS) as error:
        message = explain(error)
        fail(f"job {hydra_config.job.num}: {message}")
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    except BaseException:
        status = "interrupted"
        raise
    finally:
        folder = Path(hydra_config.sweep.dir)
        status = _write(this, folder, status, message)
        with suppress(OSError):
            os.removedirs(folder / hydra_config.sweep.subdir)  # Hydra made it; a refused run has left it empty
        if status == "interrupted":
            print_jobs(folder.absolute())
    if status == "interrupted":
        raise SystemExit(130)  # a signal is meant for the whole sweep


def _write(this: Job, folder: Path, status: str, message: str | None) -> str:
    hydra_config = HydraConfig.get()
    overrides = without_secrets(overrides_of(hydra_config))
    line: dict[str, Any] = {"job": hydra_config.job.num, "overrides": overrides}
    if this.folder is not None and not this.folder.path.exists():
        status = "refused"  # before it began
    elif this.folder is not None:
        status = this.folder.summary["status"]
        after = this.folder.summary.get("eval", {}).get("after", {})
        line |= {"run": str(this.folder.path), "accuracy": after.get("eval/accuracy")}
    line |= {"status": status, "message": message}
    with (folder / JOBS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return status


def print_jobs(folder: Path) -> bool:
    """Prints the table of a sweep's jobs so far; returns whether all of them went well."""
    file = folder / JOBS
    if not file.exists():
        return True
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    _print_table(sorted(rows, key=lambda row: row["job"]), f"{len(rows)} jobs, written to {folder}")
    return all(row["status"] in GOOD for row in rows)


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
    console.make_console().print(table)
