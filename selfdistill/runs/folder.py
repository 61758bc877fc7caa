"""The run's folder: everything that a run leaves behind, written so that a killed process loses at most one line.

    config.yaml        the composed configuration, resolved, secrets masked
    metrics.jsonl      one JSON object a logged step
    evaluation.jsonl   the rows of each evaluation, with the model's answer and the verdict
    completions.jsonl  sampled completions with reward, feedback and advantage
    prompts.md         the prompts of student and teacher at step 0, as they went into the models
    bad_rows.jsonl     rows of the data that were skipped, and why
    summary.json       status, wall time, peak memory, versions, evaluation; replaced as a whole
    error.txt          the traceback of a failed run

No heavy imports: reading a folder takes milliseconds.
"""

import errno
import fcntl
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from selfdistill.config.secrets import Redactor
from selfdistill.errors import UserError
from selfdistill.files import draft_of, remove_drafts, write_atomically
from selfdistill.machine.memory import peak_memory_gib, reset_peak_memory
from selfdistill.runs.side_by_side import CLOSED, OPENED, Stretch, columns
from selfdistill.runs.step_log import StepLog, jsonable
from selfdistill.text import printable

Status = Literal["running", "finished", "failed", "interrupted", "stopped"]

# Content by name of further files of a new run's folder, whose path is given.
Companions = Callable[[Path], Mapping[str, str]]

# Given back at the end, so that a run that fills the disk can still write down how it ended.
RESERVE, RESERVE_BYTES = ".reserve", 1 << 16

_PACKAGES = ("selfdistill", "torch", "transformers", "trl", "peft", "datasets", "vllm", "unsloth")


@dataclass(frozen=True)
class PromptSample:
    """One rollout as student and teacher saw it at step 0.

    Attributes:
        student: the student's prompt, rendered with its special tokens.
        completion: the completion, rendered with its special tokens.
        completion_ids: the ids that were sampled.
        teacher: the teacher's rendered prompt; None where the rollout has no teacher or carries no signal.
        teacher_completion_ids: the ids that the teacher scored; None where it scored nothing.
        beside: the two prompts in stretches of tokens that are the same or differ; none without a teacher's prompt.
    """

    student: str
    completion: str
    completion_ids: list[int]
    teacher: str | None = None
    teacher_completion_ids: list[int] | None = None
    beside: Sequence[Stretch] = ()


class RunFolder:
    """The folder of one run. Made by `create` or `open`, never directly.

    One process at a time writes; everyone else opens it with `write=False`.
    """

    def __init__(self, path: Path, summary: dict[str, Any], lock: IO[bytes] | None, redactor: Redactor) -> None:
        self.path = path
        self.run_id: str = summary["run_id"]
        self._summary = summary
        self._lock = lock
        self._redactor = redactor
        self._made_roots: list[Path] = []
        self._metrics = StepLog(path / "metrics.jsonl", write=lock is not None)
        self._completions = StepLog(path / "completions.jsonl", write=lock is not None)
        # A process that was killed wrote no last summary: the time of its last metrics is then the better value.
        lines = self._metrics.read()
        self._last_logged = max([int(line["step"]) for line in lines[-1:]], default=0)
        self._wall_before_s = max([float(summary.get("wall_s") or 0.0), *(x.get("time/total_s") or 0.0 for x in lines)])
        self._opened_at = time.monotonic()

    @classmethod
    def create(
        cls, root: Path, name: str, config: DictConfig, path: Path | None = None, companions: Companions = lambda _: {}
    ) -> "RunFolder":
        """Make `<root>/<run_id>` for a new run, or the folder `path`, whose name is then the run's id.

        Args:
            root: where runs go; made if it is not there.
            name: part of the run's id; characters outside letters, digits, `.`, `_`, `-` become `-`.
            config: the composed configuration.
            path: the run's own folder, instead of a new one in `root`.
            companions: further files that are there from the start: content by name, for a folder of the given path.

        The folder gets its name once its first files are in it, so that a kill leaves a run that can be resumed, or
        none: then what was being made has a hidden name, and the next run in `root` removes it.

        Raises:
            UserError: the folder cannot be made, or `path` is there and not empty.
        """
        redactor = Redactor(config)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "run"
        root = path.absolute().parent if path is not None else root
        made: Path | None = None
        made_roots: list[Path] = []
        try:
            made_roots = [folder for folder in (root, *root.parents) if not folder.exists()]
            if path is not None and path.exists() and any(path.iterdir()):
                holds = "holds a run already" if (path / "config.yaml").exists() else "is not empty"
                raise UserError(f"{path} {holds}: name another folder, or continue a run with resume=FOLDER.")
            root.mkdir(parents=True, exist_ok=True)
            remove_drafts(root)
            stem = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"
            while True:
                place = path or root / f"{stem}-{secrets.token_hex(2)}"
                made = draft_of(place.absolute())
                if path is not None:
                    shutil.rmtree(made, ignore_errors=True)  # of this process, which failed here before
                # Both fail if the folder is there, whoever made it: that is what keeps two runs apart.
                with suppress(FileExistsError):
                    made.mkdir()
                    lock = _lock(made)
                    _fill(made, place.name, {"config.yaml": redactor.yaml(), **companions(place)})
                    if _renamed(made, place):
                        made = place
                        break
                    lock.close()
                    shutil.rmtree(made)
                    if path is not None:
                        raise UserError(f"{path} is not empty: name another folder.")
            run = cls(made, _load_summary(made / "summary.json"), lock, redactor)
            run._made_roots = made_roots
            run._begin()
        except BaseException as error:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            _remove_empty(made_roots)
            if not isinstance(error, OSError):
                raise
            raise UserError(f"No run's folder can be made in {root}: {error.strerror or error}.") from error
        return run

    @classmethod
    def open(cls, path: Path, write: bool = True) -> "RunFolder":
        """Open an existing run: to continue it, or with `write=False` to read it.

        When the folder is opened for writing, a last line that a kill left incomplete is cut off.

        Raises:
            UserError: the path is not a run's folder, or another process is writing to it.
        """
        try:
            there = path.is_dir()
        except OSError as error:
            raise UserError(f"{str(path)[:200]} is no run's folder: {error.strerror}.") from error
        if not there:
            raise UserError(f"{path} is no run's folder: there is no such folder.")
        missing = [name for name in ("config.yaml", "summary.json") if not (path / name).is_file()]
        if missing:
            are = "is" if len(missing) == 1 else "are"
            raise UserError(f"{path} is no run's folder: {' and '.join(missing)} {are} missing.")
        summary = _load_summary(path / "summary.json")
        if not write:
            return cls(path, summary, None, Redactor(_load_config(path / "config.yaml")))
        try:
            lock = _lock(path)
            remove_drafts(path, all_abandoned=True)
            remove_drafts(path / "export")  # an export of its own may be under way
            run = cls(path, summary, lock, Redactor(_load_config(path / "config.yaml")))
            error_file = path / "error.txt"
            if error_file.exists():
                error_file.replace(path / "error-before-resume.txt")
            run._begin(resumed=[*summary.get("resumed", []), _now()])
        except OSError as error:
            raise UserError(f"{error.filename or path} cannot be written: {error.strerror or error}.") from error
        return run

    @property
    def is_running(self) -> bool:
        """Whether the run is not over yet: its summary does not say so, and its process still holds the lock."""
        if self._summary.get("status", "running") != "running":
            return False
        try:
            with (self.path / ".lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or there is none
            return True
        return False

    @property
    def config(self) -> DictConfig:
        """The configuration as it was composed; a masked secret reads `***`."""
        return _load_config(self.path / "config.yaml")

    @property
    def is_there(self) -> bool:
        """Whether the folder is where it was, and holds the run."""
        try:
            return (self.path / "config.yaml").is_file()
        except OSError:
            return False

    def check(self) -> None:
        """Raises UserError where the folder, or one of the run's logs, was deleted or moved while it is written to."""
        for log in (self._metrics, self._completions) if self._lock is not None else ():
            log.check()
        if not self.is_there:
            raise UserError(f"{self.path} is gone: it was deleted or moved while the run was writing to it.")

    def change_config(self, values: Mapping[str, Any]) -> None:
        """Set keys of config.yaml: what a resumed run was given anew."""
        config = self.config
        if any(config.get(key) != value for key, value in values.items()):
            config.update(values)
            write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(config))

    @property
    def overrides(self) -> list[str]:
        """The keys of the command line that started the run, secrets masked; empty where they were not kept."""
        file = self.path / ".hydra" / "overrides.yaml"
        return [str(override) for override in OmegaConf.load(file)] if file.is_file() else []

    def hides(self, arguments: Sequence[str]) -> bool:
        """Whether a command line holds a secret of this run."""
        return [self._redactor.text(a) for a in self._redactor.arguments(arguments)] != list(arguments)

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json; of a run that was killed, with the last step that it logged."""
        logged = self._last_logged if self._summary.get("status", "running") == "running" else 0
        return {**self._summary, "step": max(self._summary.get("step") or 0, logged)}

    @property
    def wall_s(self) -> float:
        """Seconds this run has taken, those before every resume included."""
        if self._lock is None:
            return self._wall_before_s
        return self._wall_before_s + time.monotonic() - self._opened_at

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return self._metrics.read()

    def completions(self) -> list[dict[str, Any]]:
        """The lines of completions.jsonl."""
        return self._completions.read()

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics to the line of `step`; NaN and infinities become null. `time/total_s` is added."""
        self._metrics.merge(step, {**metrics, "time/total_s": round(self.wall_s, 3)})
        self._last_logged = step

    def log_completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append sampled completions: mappings with prompt, completion, reward, feedback, advantage."""
        for row in rows:
            self._completions.append({"step": step, **row})

    def truncate_metrics(self, step: int) -> int:
        """Drop metrics and completions of steps after `step`, which a resumed run repeats; returns how many lines."""
        return self._metrics.truncate(step) + self._completions.truncate(step)

    def truncate_completions(self, step: int) -> int:
        """Drop completions of steps after `step`; returns how many lines."""
        return self._completions.truncate(step)

    def write_prompts(self, samples: Sequence[PromptSample]) -> bool:
        """Write prompts.md; returns whether the teacher scored the very ids that the student sampled."""
        parts = ["# What student and teacher saw at step 0\n"]
        if any(sample.beside for sample in samples):
            parts.append(f"Side by side, the tokens in which the two prompts differ stand in {OPENED}{CLOSED}.\n")
        agree = True
        for index, sample in enumerate(samples):
            ids, scored = sample.completion_ids, sample.teacher_completion_ids
            no_teacher = "None: this rollout carries no teacher's signal.\n"
            parts += [
                f"## Rollout {index}\n\n### The student's prompt\n\n{_fenced(sample.student)}",
                f"### The teacher's prompt\n\n{no_teacher if sample.teacher is None else _fenced(sample.teacher)}",
                f"### Side by side\n\n{_fenced(columns(sample.beside, 'student', 'teacher'))}" if sample.beside else "",
                f"### The completion\n\n{_fenced(sample.completion)}",
                f"{len(ids)} token ids: {' '.join(map(str, ids))}\n",
            ]
            if scored == ids:
                parts.append("The teacher scored the same token ids.\n")
            elif scored is not None:
                agree = False
                parts.append(f"The teacher scored OTHER token ids: {' '.join(map(str, scored))}\n")
        write_atomically(self.path / "prompts.md", "\n".join(parts))
        return agree

    def write_bad_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write bad_rows.jsonl, one object a skipped row; no rows, no file."""
        lines = [json.dumps(jsonable(row), ensure_ascii=False) for row in rows]
        if lines:
            write_atomically(self.path / "bad_rows.jsonl", "\n".join(lines) + "\n")

    def update_summary(self, **values: Any) -> None:
        """Set keys of summary.json, the wall time and the peak memory with them; the file is replaced as a whole."""
        if self._lock is not None:
            peak = peak_memory_gib()
            for name, before in (self._summary.get("peak_memory_gib") or {}).items():
                peak[name] = max(before or 0.0, peak.get(name, 0.0))
            self._summary.update(wall_s=round(self.wall_s, 3), peak_memory_gib=peak)
        self._summary.update(jsonable(values))
        write_atomically(self.path / "summary.json", json.dumps(self._summary, indent=2, ensure_ascii=False) + "\n")

    def finish(self, status: Status, traceback: str | None = None, **values: Any) -> None:
        """Write the last summary, and the traceback of a failed run to error.txt, and unlock the folder.

        The wall time is not counted any further; `update_summary` still works, for what is added later (an export).

        Raises:
            UserError: the folder is gone.
            OSError: there is no place on the disk, not even that which is kept for this.
        """
        try:
            if status == "finished":
                self.check()
            if not self.is_there:
                raise UserError(f"{self.path} is gone: it was deleted or moved while the run was writing to it.")
            (self.path / RESERVE).unlink(missing_ok=True)
            values = {"step": self.summary["step"], **values}
            if traceback is not None:
                with suppress(OSError):  # the status matters more
                    write_atomically(self.path / "error.txt", self._redactor.text(traceback))
            self.update_summary(status=status, ended=_now(), **values)
        finally:
            self._close()

    def discard(self) -> None:
        """Remove the folder that `create` made, and its parents that were made with it, of a run that was refused."""
        self._close()
        shutil.rmtree(self.path)
        _remove_empty(self._made_roots)

    def _close(self) -> None:
        self._metrics.close()
        self._completions.close()
        if self._lock is not None:
            self._wall_before_s = self.wall_s
            self._lock.close()
            self._lock = None

    def _begin(self, **values: Any) -> None:
        reset_peak_memory()
        (self.path / RESERVE).write_bytes(os.urandom(RESERVE_BYTES))
        self.update_summary(
            status="running",
            ended=None,
            command=self._redactor.text(shlex.join(self._redactor.arguments(sys.orig_argv))),
            folder=os.getcwd(),
            host=socket.gethostname(),
            process=os.getpid(),
            git=_git_state(),
            versions=_versions(),
            **values,
        )


def _remove_empty(roots: Iterable[Path]) -> None:
    with suppress(OSError):  # another run is in it by now
        for root in roots:
            root.rmdir()


def _fill(folder: Path, run_id: str, files: Mapping[str, str]) -> None:
    summary = {"run_id": run_id, "status": "running", "started": _now(), "step": 0}
    for name, content in {**files, "summary.json": json.dumps(summary) + "\n"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


def _renamed(folder: Path, place: Path) -> bool:
    """Gives a folder its name; returns whether nothing else had it."""
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def _lock(path: Path) -> IO[bytes]:
    lock = (path / ".lock").open("ab")
    try:
        # The kernel lets go of it when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UserError(
            f"{path} is in use: another process is still writing to this run. Stop that one first."
        ) from error
    return lock


def _load_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no run's summary: {error}.") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("run_id"), str):
        raise UserError(f"{path} is no run's summary: it has no run_id.")
    return summary


def _load_config(path: Path) -> DictConfig:
    try:
        config = OmegaConf.load(path)
        OmegaConf.to_container(config, resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} is not a configuration: it holds a list.")
    return config


def _fenced(text: str) -> str:
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{printable(text)}\n{fence}\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _git_state() -> dict[str, Any] | None:
    """Commit of the current folder's repository, and whether files differ from it; None outside of one."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=5)
    return done.stdout.strip()
