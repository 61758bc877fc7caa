"""Sweeps (--multirun): all jobs are checked before the first starts, one that fails stops no other, a table ends it."""

import multiprocessing
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from selfdistill.config import COMPOSITION_ERRORS, check, explain, fail
from selfdistill.config.overrides import key_of
from selfdistill.config.permissions import asked_for, check_granted
from selfdistill.config.secrets import without_secrets
from selfdistill.config.targets import check_targets
from selfdistill.errors import UserError
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.preflight import look_for_files
from selfdistill.runs.screen import Screen
from selfdistill.runs.sweep_folder import Job, JobStatus, SweepFolder, objective_of, resumed_arguments
from selfdistill.runs.sweep_table import table_of


class CheckSweep(Callback):
    """Checks every job of a sweep before the first one starts, and shows at the end what came of them."""

    started: DictConfig | None = None  # the sweep that is under way

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Keeps Hydra from making `hydra.run.dir` before anything is checked: the run makes its folder itself."""
        with open_dict(config.hydra.run):
            config.hydra.run.folder = None if config.hydra.run.dir == "." else config.hydra.run.dir
            config.hydra.run.dir = "."

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Takes the secrets out of multirun.yaml, which Hydra's sweepers write before their first job."""
        if config.hydra.mode == RunMode.MULTIRUN:
            SweepFolder(config.hydra.sweep.dir).mask(overrides_of(config.hydra))

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
            folder, resumes = SweepFolder(config.hydra.sweep.dir), config.get("resume_sweep") is not None
            if not config.check and folder.exists and not resumes:
                raise UserError(f"hydra.sweep.dir={folder.path} holds a sweep already: name another folder.")
            if resumes:
                _only_this_process_resumes(config)
                still = [number for number, job in folder.settled().items() if job.status == "running"]
                if still:
                    raise UserError(f"resume_sweep={folder.path}: job {still[0]} is still running. Stop it first.")
            _check_granted(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]), config)
            _name_by_swept_keys(config)
            # The jobs are forks of this process, which therefore must not take hold of a GPU.
            os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
            jobs = check_jobs(config) if issubclass(get_class(config.hydra.sweeper._target_), BasicSweeper) else None
        except (UserError, *COMPOSITION_ERRORS) as error:
            raise SystemExit(fail(explain(error))) from None
        if config.check:
            rows = [Job(number, overrides, "checked") for number, overrides in enumerate(jobs or ())]
            searches = "a search chooses its jobs as it goes: each is checked when it starts"
            done = table_of(rows, f"{len(rows)} jobs checked: nothing was loaded or written")
            Screen().print(searches if jobs is None else done)
            raise SystemExit(0)
        if not resumes:
            folder.begin(sys.argv[1:], jobs)
        CheckSweep.started = config

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints the table of the jobs and compares the runs; the exit code is 1 where one of them failed."""
        folder = Path(config.hydra.sweep.dir)
        went_well = print_jobs(folder)
        if any(job.run for job in SweepFolder(folder).jobs().values()):
            _compare(folder, config.objective)
        if not went_well:
            raise SystemExit(1)


@contextmanager
def searching() -> Iterator[None]:
    """A search is made herein: Optuna ends one without a single finished run by an error, before the table is shown."""
    CheckSweep.started = None
    try:
        yield
    except ValueError as error:
        if CheckSweep.started is None or "No trials are completed yet" not in str(error):
            raise
        try:
            CheckSweep().on_multirun_end(CheckSweep.started)
        finally:
            fail("no run of the search has ended well, so there is no best one: the table above says why.")


def _only_this_process_resumes(config: DictConfig) -> None:
    """Takes `resume_sweep` out of what the sweeper hands to the jobs, which are those of the plan."""
    config.hydra.overrides.task = [o for o in overrides_of(config.hydra) if not o.startswith("resume_sweep=")]


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
    known = SweepFolder(config.hydra.sweep.dir).jobs()
    ahead = [job for number, job in enumerate(jobs) if number not in known or not known[number].is_done]
    composed = [compose(config.hydra.job.config_name, list(job)) for job in ahead]
    for cfg in composed:
        _check_granted(cfg, config)
    runs = [check(cfg, list(job)) for cfg, job in zip(composed, ahead, strict=True)]
    for run in runs:
        look_for_files(run)

    if use_unsloth(config, jobs):
        return [list(job) for job in jobs]  # whose arguments each checks when it starts
    from selfdistill.training.arguments import ARGUMENTS  # imports torch and trl, which takes seconds

    for run in runs:
        check_targets(run, ARGUMENTS)
    return [list(job) for job in jobs]


def _check_granted(cfg: DictConfig, config: DictConfig) -> None:
    """Raises UserError where a sweep that goes on gets leave to run code from a file, which may have come with it.

    Its command line's grants were typed again, without which it does not come so far (`resumed_arguments`).
    """
    if (folder := config.get("resume_sweep")) is not None:
        typed = {key_of(override) for override in overrides_of(config.hydra)}
        wanted = {key: value for key, value in asked_for(cfg).items() if key not in typed}
        check_granted(wanted, {}, f"resume_sweep={folder}", "the configuration of one of its jobs")


def use_unsloth(config: DictConfig, jobs: Iterable[Sequence[str]]) -> bool:
    """Whether jobs use unsloth, by the command line: it comes before TRL, which this process then must not import."""
    named = any(override.endswith("model.loader=unsloth") for job in jobs for override in job)
    return named or OmegaConf.select(config, "model.loader") == "unsloth"


class ThisJob:
    """The job of a sweep that this process is at, or a run by itself.

    Attributes:
        objective: the value that a sweeper looks at; None before the end.
        is_over: whether a sweep that goes on finished this job before.
    """

    def __init__(self, sweep: SweepFolder | None = None, job: Job | None = None) -> None:
        self._sweep, self._job = sweep, job
        self._run: RunFolder | None = None
        self.objective = job.objective if job is not None else None
        self.is_over = job is not None and job.is_done

    def begin(self, run: RunFolder) -> None:
        """Enters the run's folder."""
        self._run = run
        if self._job is not None:
            self.note(replace(self._job, status="running", run=str(run.path), message=None))

    def note(self, job: Job) -> None:
        """Enters what has become of the job."""
        self._job = job
        if self._sweep is not None:
            self._sweep.note(job)

    def end(self, status: JobStatus, message: str | None) -> JobStatus:
        """Enters how the job ended; returns its status, which is the run's where there is one."""
        run = self._run
        if run is not None and not run.path.exists():
            status = "refused"  # before it began
        elif run is not None:
            status = run.summary["status"]
            self.objective = objective_of(run)
        if self._job is not None:
            where = str(run.path) if run is not None and status != "refused" else None
            self.note(replace(self._job, status=status, run=where, message=message, objective=self.objective))
        return status


@contextmanager
def job(cfg: DictConfig) -> Iterator[ThisJob]:
    """The context of one run. Within a sweep a failure ends this job alone, and stands in the sweep's table.

    A job that was interrupted, or killed, continues its run: `resume` is set.
    """
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        this = ThisJob()
        yield this
        if not cfg.check:
            this.end("finished", None)
        return
    if cfg.group is None:
        cfg.group = "-".join(Path(hydra_config.sweep.dir).parts[-2:])
    folder, number = SweepFolder(hydra_config.sweep.dir), int(hydra_config.job.num)
    overrides = without_secrets(overrides_of(hydra_config))
    planned = folder.settled().get(number)
    if planned is None or (planned.status == "waiting" and planned.overrides != overrides):
        planned = Job(number, overrides)
    this, message = ThisJob(folder, planned), None
    status: JobStatus = "failed"
    try:
        if planned.overrides != overrides:
            raise UserError(
                "the search proposes other values than before, so it cannot go on: give it a seed when it is started, "
                "hydra.sweeper.sampler.seed=0."
            )
        if planned.continues:
            cfg.resume = planned.run
        yield this
        status = "finished"
    except (UserError, *COMPOSITION_ERRORS) as error:
        message = explain(error)
        fail(f"job {number}: {message}")
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    except BaseException:
        status = "interrupted"
        raise
    finally:
        if not this.is_over:
            status = this.end(status, message)
        with suppress(OSError):
            os.removedirs(folder.path / hydra_config.sweep.subdir)  # Hydra made it; a refused run has left it empty
        if status == "interrupted" and multiprocessing.parent_process() is None:
            print_jobs(folder.path)
    if status == "interrupted":
        raise SystemExit(130)  # a signal is meant for the whole sweep


def print_jobs(folder: Path) -> bool:
    """Prints the table of a sweep's jobs so far, and how to go on; returns whether all of them went well."""
    jobs = list(SweepFolder(folder).settled().values())
    if not jobs:
        return True
    screen = Screen()
    screen.print(table_of(jobs, f"{len(jobs)} jobs, written to {folder}"))
    left = [job for job in jobs if not job.is_done]
    if left:
        counts = ", ".join(f"{count} {status}" for status, count in Counter(job.status for job in left).items())
        again = SweepFolder(folder).resume_command()
        screen.print(f"{counts}; go on with: {again}", markup=False, soft_wrap=True)
    return not left


def _compare(folder: Path, metric: str) -> None:
    """Writes the comparison of the sweep's runs into its folder, and shows it; a failure leaves the runs alone."""
    from selfdistill.comparison import report
    from selfdistill.comparison.terminal import show

    try:
        show(*report(folder, metric=metric))
    except Exception as error:  # noqa: BLE001 - the runs are done, whatever the report stumbles over
        Screen().print(f"The runs could not be compared: {error}", markup=False)


def command_line(arguments: list[str]) -> list[str]:
    """The arguments, where `sweep=NAME` and `resume_sweep=FOLDER` bring `--multirun` along.

    Raises:
        UserError: `resume_sweep` names no sweep, or another key stands beside it.
    """
    full = resumed_arguments(arguments)
    sweeps = any(a.startswith(("sweep=", "resume_sweep=")) and not a.endswith("=null") for a in full)
    flags = ("-m", "--multirun", "--help", "-h", "--cfg", "-c", "--info", "-i")
    return ["--multirun", *full] if sweeps and not any(a.split("=")[0] in flags for a in full) else full
