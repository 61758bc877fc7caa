"""A sweep's folder: its plan from the start, and what has become of each job, whatever launched it.

sweep.json     the command line that made the sweep, secrets masked
jobs.jsonl     a line whenever a job changes: number, overrides, status, run, message; a job's last line counts
logs/          what each job printed
report/        the runs compared
"""

import fcntl
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from selfdistill.config.overrides import key_of
from selfdistill.config.permissions import NAMES, granting, not_granted
from selfdistill.config.secrets import without_secrets
from selfdistill.errors import MASK, UserError, shortened, without_passwords
from selfdistill.files import write_atomically
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.step_log import jsonable

PLAN, JOBS, LOGS = "sweep.json", "jobs.jsonl", "logs"
GOOD = ("finished", "stopped", "checked")
COMMANDS = ("setup", "additional_parameters")  # what of SLURM's launcher runs in a shell

JobStatus = Literal[
    "waiting", "running", "finished", "stopped", "checked", "interrupted", "killed", "failed", "refused"
]


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        number: from 0, in the order of the plan.
        overrides: its keys on the command line, secrets masked.
        status: that of its run; "waiting" before it began, "refused" where it was not let begin, "killed" where its
            process ended without a word.
        run: the run's folder, as soon as there is one.
        message: why it failed.
        objective: the value of the metric that `objective` names, after the training.
    """

    number: int
    overrides: list[str]
    status: JobStatus = "waiting"
    run: str | None = None
    message: str | None = None
    objective: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether a sweep that goes on has nothing left to do here."""
        return self.status in GOOD

    @property
    def continues(self) -> bool:
        """Whether a sweep that goes on continues this job's run, and does not begin a new one."""
        return self.status in ("interrupted", "killed") and self.run is not None and Path(self.run).is_dir()


class SweepFolder:
    """The folder of one sweep, which several processes, on several machines, write to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether there is a sweep in the folder."""
        return (self.path / PLAN).exists() or (self.path / JOBS).exists()

    def begin(self, arguments: Sequence[str], jobs: Sequence[Sequence[str]] | None) -> None:
        """Writes the plan of a new sweep.

        Args:
            arguments: the command line.
            jobs: each job's overrides; None where the sweeper decides as it goes.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        plan = {"arguments": without_secrets(arguments), "folder": os.getcwd(), "adaptive": jobs is None}
        write_atomically(self.path / PLAN, json.dumps(plan, indent=2, ensure_ascii=False) + "\n")
        for number, overrides in enumerate(jobs or ()):
            self.note(Job(number, without_secrets(overrides)))

    def plan(self) -> dict[str, Any]:
        """The command line `arguments`, the `folder` it was typed in, and whether the sweep is `adaptive`.

        Raises:
            UserError: the folder is not that of a sweep.
        """
        try:
            plan: dict[str, Any] = json.loads((self.path / PLAN).read_text(encoding="utf-8"))
            return {"arguments": [str(a) for a in plan["arguments"]], "folder": plan["folder"]} | plan
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"resume_sweep={shortened(str(self.path))}: {PLAN} of a sweep is not there, or cannot be read."
            ) from None

    def resume_command(self) -> str:
        """The command that goes on with the sweep, with what it has to be granted again."""
        recorded = self.plan()["arguments"] if (self.path / PLAN).exists() else []
        words = [f"resume_sweep={shlex.quote(str(self.path))}", *map(shlex.quote, _granting(recorded))]
        return " ".join(["python -m selfdistill.train", *words])

    def mask(self, overrides: Sequence[str]) -> None:
        """Takes the secrets of these overrides out of the multirun.yaml that Hydra's sweepers write."""
        file, masked = self.path / "multirun.yaml", without_secrets(overrides)
        if masked == list(overrides) or not file.is_file():
            return
        written = file.read_text(encoding="utf-8")
        for override, mask in zip(overrides, masked, strict=True):
            written = written.replace(override, mask)
        write_atomically(file, without_passwords(written))

    def note(self, job: Job) -> None:
        """Enters what has become of a job."""
        values = asdict(job)
        line = json.dumps(jsonable({"job": values.pop("number"), **values}), ensure_ascii=False)
        with (self.path / JOBS).open("a", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # also between the machines of a cluster
            file.write(f"{line}\n")

    def jobs(self) -> dict[int, Job]:
        """Every job by its number, as the last line on it has it."""
        file, found = self.path / JOBS, {}
        names = {field.name for field in fields(Job)}
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                values = json.loads(line)
            except ValueError:  # a kill left half of it
                continue
            values["number"] = values.pop("job")
            found[values["number"]] = Job(**{name: value for name, value in values.items() if name in names})
        return dict(sorted(found.items()))

    def left(self, numbers: Iterable[int]) -> list[int]:
        """Those of these jobs that a sweep that goes on has to start."""
        # A search has gone on from what failed: it would now propose others, were the failed jobs repeated.
        over = (*GOOD, "failed", "refused") if self.plan()["adaptive"] else GOOD
        jobs = self.settled()
        return [number for number in numbers if number not in jobs or jobs[number].status not in over]

    def settled(self) -> dict[int, Job]:
        """Every job, those whose process is gone with what their runs' folders say."""
        return {number: _settled(job) for number, job in self.jobs().items()}


def _settled(job: Job) -> Job:
    """A job that is entered as running, as it is: running, over, or killed."""
    if job.status != "running" or job.run is None:
        return job
    try:
        run = RunFolder.open(Path(job.run), write=False)
    except UserError:
        return replace(job, status="killed")
    status = run.summary["status"]
    if status == "running":
        return job if run.is_running else replace(job, status="killed")
    return replace(job, status=status, objective=objective_of(run))


def objective_of(run: RunFolder) -> float | None:
    """The run's `objective`: that of the last evaluation, or the metric's last value; None where there is neither."""
    name = str(run.config.get("objective") or "eval/accuracy")
    after = (run.summary.get("eval") or {}).get("after") or {}
    values = [after.get(name), *(line.get(name) for line in reversed(run.metrics()))]
    return next((float(value) for value in values if value is not None), None)


def resumed_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line of the sweep that `resume_sweep=FOLDER` names, with what is given anew; otherwise as it is.

    The launcher may be another one; secrets, which are not recorded, and what runs code of others are given again. The
    current folder becomes that in which the sweep was started, so that relative paths mean what they meant.

    Raises:
        UserError: not a sweep's folder, another key beside it, or a secret or a grant is missing.
    """
    named = [a for a in arguments if a.startswith("resume_sweep=")]
    if not named or named[-1] == "resume_sweep=null":
        return list(arguments)
    path = Path(named[-1].removeprefix("resume_sweep=").strip("'\"")).absolute()
    plan = SweepFolder(path).plan()
    recorded: list[str] = plan["arguments"]
    hidden = {key_of(argument) for argument in recorded if MASK in argument}
    given = {key_of(a): a for a in arguments if a not in named and not a.startswith("-")}
    for key in given:
        again = key in hidden or key.rpartition(".")[2] in NAMES or given[key] in recorded
        if not again and key != "check" and not _of_launcher(key):
            raise UserError(
                f"{shortened(key)} cannot be changed when a sweep goes on: its jobs are in "
                f"{shortened(str(path))}/{JOBS}."
            )
    if missing := sorted(hidden - set(given)):
        raise UserError(
            f"{named[-1]}: {missing[0]} is secret and was not recorded; give it again: {named[-1]} '{missing[0]}=…'."
        )
    if missing := [a for a in _granting(recorded) if key_of(a) not in given]:
        raise not_granted(named[-1], f"its {PLAN}", missing[0], shlex.quote(missing[0]))
    others = [
        a for a in recorded if key_of(a) != "hydra.sweep.dir" and not ("hydra/launcher" in given and _of_launcher(a))
    ]
    kept = [given.get(key_of(a), a) for a in others]  # in their places: a job is known by its keys in their order
    new = [a for a in given.values() if a not in kept]
    if Path(plan["folder"]).is_dir():
        os.chdir(plan["folder"])
    folder = os.path.relpath(path)
    flags = [a for a in arguments if a.startswith("--check")]
    return [*kept, *flags, *new, f"hydra.sweep.dir={_quoted(folder)}", f"resume_sweep={_quoted(folder)}"]


def _granting(arguments: Sequence[str]) -> list[str]:
    """Those of a sweep's command line that run code of others, in its jobs or in their launcher's shell."""
    shell = [a for a in arguments if _of_launcher(a) and any(name in a for name in COMMANDS)]
    return [*granting(arguments), *shell]


def _of_launcher(argument: str) -> bool:
    return key_of(argument).startswith(("hydra/launcher", "hydra.launcher."))


def _quoted(text: str) -> str:
    """A text in quotes, as Hydra's grammar has them."""
    return "'{}'".format(text.replace("\\", "\\\\").replace("'", "\\'"))
