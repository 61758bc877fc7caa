"""The jobs of a sweep in processes of their own: a queue over the GPUs there are, or over shares of the CPU.

The program has imported torch and what else a job needs when it has checked the jobs; each job is a fork of it, which
spares the import. It has not touched a GPU by then, and has started no thread. Where jobs use unsloth, which comes
before the rest, each imports all of it itself.
"""

import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, Protocol, runtime_checkable

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from selfdistill.config.secrets import without_secrets
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.sweep_folder import LOGS, Job, SweepFolder
from selfdistill.runs.sweep_table import LiveTable

SHOW_S = 1.0  # between two tables
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PARENT_IS_GONE = 1  # PR_SET_PDEATHSIG of prctl(2)
OVER = 130  # exit code of an interrupted command
Handler = Callable[[int, FrameType | None], Any] | int | None


@runtime_checkable
class Handle(Protocol):
    """A job that was started."""

    def exit_code(self) -> int | None:
        """None while it runs, below zero where a signal ended it."""

    def stop(self) -> None:
        """Asks it to save a checkpoint and end; asked again, it ends at once."""

    @property
    def log(self) -> Path:
        """What the job printed."""


class Forked:
    """A job in a fork of this process."""

    def __init__(self, process: Any, slot: dict[str, str], log: Path) -> None:
        self.process, self.slot, self.log, self._asked = process, slot, log, 0

    def exit_code(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def stop(self) -> None:
        self._asked += 1
        with suppress(ProcessLookupError):
            # A run saves a checkpoint at the first Ctrl-C, and ends at once at the second.
            os.kill(self.process.pid, signal.SIGINT if self._asked < 3 else signal.SIGKILL)


def launch_forked(
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    n_jobs: int | None,
) -> list[JobReturn]:
    """Runs each job in a process of its own.

    Args:
        first: number of the first of these jobs.
        n_jobs: jobs at once; None takes one for each GPU, or one on the CPU.
    """
    setup_globals()
    from selfdistill.runs.sweep import overrides_of, use_unsloth

    if not use_unsloth(config, job_overrides):
        # Imported once, before the forks.
        from selfdistill.runs import cards, plan, sequence, session  # noqa: F401
        from selfdistill.training import build  # noqa: F401

    gpus = visible_gpus()
    at_once = n_jobs or len(gpus) or 1
    slots = [_slot(number, min(at_once, len(job_overrides)), gpus) for number in range(at_once)]
    forks = multiprocessing.get_context("fork")
    folder = SweepFolder(config.hydra.sweep.dir)
    (folder.path / LOGS).mkdir(parents=True, exist_ok=True)
    folder.mask(overrides_of(config.hydra))

    def start(number: int, overrides: Sequence[str]) -> Forked | None:
        if not slots:
            return None
        slot = slots.pop(0)
        log = folder.path / LOGS / f"job-{number}.txt"
        arguments = (hydra_context, task_function, config, list(overrides), number, slot, log)
        process = forks.Process(target=_work, args=arguments, name=f"job {number}")
        sys.stdout.flush()
        sys.stderr.flush()
        process.start()
        return Forked(process, slot, log)

    def ended(handle: Handle) -> None:
        assert isinstance(handle, Forked)
        handle.process.join()
        slots.append(handle.slot)

    return follow(folder, job_overrides, first, start, ended)


def _slot(number: int, at_once: int, gpus: Sequence[str]) -> dict[str, str]:
    """The environment of the jobs that take this place in the queue: a GPU, and a share of the CPU's threads."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // at_once))
    gpu = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
    return gpu | dict.fromkeys(THREADS, threads)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here; asks the driver, since torch would take hold of a GPU."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.check_output(["nvidia-smi", "-L"], stderr=subprocess.DEVNULL, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"UUID: (MIG-[^)\s]+)", listed) or re.findall(r"^GPU (\d+):", listed, flags=re.MULTILINE)


def _work(
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
    overrides: list[str],
    number: int,
    environment: dict[str, str],
    log: Path,
) -> None:
    """One job, in its process."""
    # Ctrl-C at the terminal comes to the parent alone, which passes it on; and nobody is left behind without it.
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PARENT_IS_GONE, signal.SIGTERM)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(printed, stream)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        sweep_config = hydra_context.config_loader.load_sweep_config(config, overrides)
        with open_dict(sweep_config):
            sweep_config.hydra.job.id = sweep_config.hydra.job.num = number
        run_job(
            hydra_context=hydra_context,
            task_function=task_function,
            config=sweep_config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    except KeyboardInterrupt:
        raise SystemExit(OVER) from None


def follow(
    folder: SweepFolder,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    start: Callable[[int, Sequence[str]], Handle | None],
    ended: Callable[[Handle], None] = lambda handle: None,
    poll_s: float = 0.05,
) -> list[JobReturn]:
    """Starts the jobs that are not done yet, shows how far they are, and ends them at Ctrl-C.

    Args:
        start: starts the job with a number and its overrides, or returns None while there is no room for it.
        ended: called when a job is over.
        poll_s: seconds between two looks at the jobs.

    Raises:
        SystemExit: the sweep was interrupted, after all jobs have ended.
    """
    numbered = dict(enumerate(job_overrides, first))
    known = folder.settled()
    for number, overrides in numbered.items():
        if number not in known:
            folder.note(Job(number, without_secrets(overrides)))
    waiting = folder.left(numbered)
    running: dict[int, Handle] = {}
    with _Interrupts(running) as interrupts, LiveTable(f"sweep in {folder.path}") as table:
        shown = float("-inf")
        while running or (waiting and not interrupts.count):
            while waiting and not interrupts.count and (handle := start(waiting[0], numbered[waiting[0]])) is not None:
                running[waiting.pop(0)] = handle
            over = {number: code for number, handle in running.items() if (code := handle.exit_code()) is not None}
            for number, code in over.items():
                handle = running.pop(number)
                ended(handle)
                _settle(folder, number, code, handle.log)
            if over or time.monotonic() - shown > SHOW_S:
                table.show(folder.jobs().values())
                shown = time.monotonic()
            time.sleep(poll_s)
        table.show(folder.jobs().values())
    if interrupts.count:
        from selfdistill.runs.sweep import print_jobs

        print_jobs(folder.path)
        raise SystemExit(OVER)
    jobs = folder.jobs()
    # A job that failed has no value; as an exception it would end the sweep.
    return [
        JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED, _return_value=jobs[number].objective)
        for number, overrides in numbered.items()
    ]


def _settle(folder: SweepFolder, number: int, code: int, log: Path) -> None:
    """Enters a job whose process ended without having entered so itself."""
    job = folder.settled()[number]
    if job.status not in ("waiting", "running", "killed"):
        if job != folder.jobs()[number]:
            folder.note(job)
        return
    if code == OVER:
        folder.note(replace(job, status="interrupted"))
        return
    how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
    why = " Was there too little memory? The kernel's log (dmesg) says so." if code == -signal.SIGKILL else ""
    message = f"The job's process was ended {how}.{why} What it printed is in {log}."
    if job.run is not None:
        with suppress(OSError):
            RunFolder.open(Path(job.run), write=False).finish("failed", f"{message}\n")
    folder.note(replace(job, status="killed", message=message))


class _Interrupts:
    """While the context lasts, Ctrl-C and SIGTERM end the jobs: the first in good order, the next ones at once.

    Attributes:
        count: signals so far.
    """

    def __init__(self, running: dict[int, Handle]) -> None:
        self.running, self.count = running, 0
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> "_Interrupts":  # noqa: PYI034 - beartype, which checks types in the tests, refuses Self here
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            notice = b"\nThe jobs save a checkpoint and end; those that wait are not started. Again: all end at once.\n"
            os.write(2, notice)
        for handle in list(self.running.values()):
            handle.stop()


class Submitted:
    """A job that submitit has sent off: to SLURM, or to a process of this machine."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def exit_code(self) -> int | None:
        if not self.job.done():
            return None
        with suppress(Exception):  # whatever made it end without a result stands in its log
            self.job.results()
            return 0
        return 1

    @property
    def log(self) -> Path:
        return Path(self.job.paths.stderr)

    def stop(self) -> None:
        self.job.cancel(check=False)  # of SLURM, which gives a job some seconds (KillWait) after its SIGTERM


class SubmittedHere(Submitted):
    """A job in a process of this machine. submitit's own way to end it leaves it one second to save a checkpoint.

    Args:
        begun: whether the run has begun. Before, submitit makes nothing of a SIGTERM, so that it is sent again.
    """

    def __init__(self, job: Any, begun: Callable[[], bool]) -> None:
        super().__init__(job)
        self.begun, self._asked, self._heard = begun, 0, False

    def exit_code(self) -> int | None:
        if self._asked and not self.job.done() and not self._heard:
            self._heard = self.begun()
            os.kill(int(self.job.job_id), signal.SIGTERM)  # submitit's controller passes it on
        if self._asked and self.job.done() and not self.job.paths.result_pickle.exists():
            return OVER  # submitit would wait for a result
        return super().exit_code()

    def stop(self) -> None:
        self._asked += 1
        if self._asked > 1:
            super().stop()


@contextmanager
def _in_their_own_sessions() -> Iterator[None]:
    """The processes that submitit starts herein get no Ctrl-C of the terminal: the sweep passes it on."""
    from submitit.local import local

    process: Any = partial(subprocess.Popen, start_new_session=True)
    local.subprocess = SimpleNamespace(Popen=process)  # type: ignore[assignment]
    try:
        yield
    finally:
        local.subprocess = subprocess


def launch_submitted(launcher: Any, executor: Any, job_overrides: Sequence[Sequence[str]], first: int) -> list[Any]:
    """Sends the jobs that are not done yet off with submitit, all at once, and follows them.

    Args:
        launcher: what submitit calls in each job; a launcher of hydra-submitit-launcher.
        executor: of submitit, with the resources that a job asks for.
    """
    import submitit

    from selfdistill.runs.sweep import overrides_of

    folder = SweepFolder(launcher.config.hydra.sweep.dir)
    folder.mask(overrides_of(launcher.config.hydra))
    pickles = Path(executor.folder).parent  # above the folders that are named by the jobs' ids
    pickles.mkdir(parents=True, exist_ok=True)
    pickles.chmod(0o700)
    handles: dict[int, Submitted] = {}
    state = Singleton.get_state()

    def start(number: int, overrides: Sequence[str]) -> Submitted:
        if not handles:
            sent = folder.left(range(first, first + len(job_overrides)))
            with _in_their_own_sessions(), executor.batch():
                jobs = {
                    n: executor.submit(
                        launcher, list(job_overrides[n - first]), "hydra.sweep.dir", n, f"job {n}", state
                    )
                    for n in sent
                }
            for n, job in jobs.items():
                here = isinstance(job, submitit.LocalJob)
                begun = partial(lambda n: folder.jobs()[n].status == "running", n)
                handles[n] = SubmittedHere(job, begun) if here else Submitted(job)
        return handles[number]

    def ended(handle: Handle) -> None:
        """Removes what submitit pickled for the job: it holds the secrets of the command line."""
        assert isinstance(handle, Submitted)
        for file in (handle.job.paths.submitted_pickle, handle.job.paths.result_pickle):
            Path(file).unlink(missing_ok=True)

    return follow(folder, job_overrides, first, start, ended, poll_s=0.5)
