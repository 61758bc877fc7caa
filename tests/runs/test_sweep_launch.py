"""How the jobs of a sweep are started, followed and ended, with stand-ins for their processes."""

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from selfdistill.runs import sweep_launch
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.screen import Screen
from selfdistill.runs.sweep_folder import Job, SweepFolder
from selfdistill.runs.sweep_launch import Submitted, SubmittedHere, follow, launch_submitted, visible_gpus
from selfdistill.runs.sweep_table import LiveTable, Progress, progress_of, table_of
from tests.reference import ROOT
from tests.runs import saving_job

GRID = [[f"seed={seed}"] for seed in range(4)]


class Stand:
    """A job that ends with an exit code after some looks, or as soon as it is asked to."""

    def __init__(self, code: int, looks: int = 2) -> None:
        self.code, self.looks, self.asked, self.log = code, looks, 0, Path("log.txt")

    def exit_code(self) -> int | None:
        self.looks -= 1
        return self.code if self.looks < 0 else None

    def stop(self) -> None:
        self.asked += 1
        self.code, self.looks = 130, 0


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    folder = SweepFolder(tmp_path / "sweep")
    folder.begin(["--multirun", "seed=0,1,2,3"], GRID)
    return folder


def test_a_job_is_started_as_soon_as_there_is_room_and_a_killed_one_is_entered(folder: SweepFolder) -> None:
    most, running = [], []

    def start(number: int, overrides: Sequence[str]) -> Stand | None:
        assert overrides == GRID[number]
        if len(running) == 2:
            return None
        running.append(stand := Stand(-9 if number == 1 else 0))
        most.append(len(running))
        if number != 1:
            folder.note(Job(number, [*overrides], "finished", objective=float(number)))
        return stand

    returns = follow(folder, GRID, 0, start, running.remove, poll_s=0.0)
    assert max(most) == 2
    assert [back.return_value for back in returns] == [0.0, None, 2.0, 3.0]
    killed = folder.jobs()[1]
    assert killed.status == "killed"
    assert "SIGKILL" in str(killed.message)


def test_what_is_done_is_not_started_again(folder: SweepFolder) -> None:
    folder.note(Job(1, GRID[1], "finished", objective=0.5))
    folder.note(Job(2, GRID[2], "failed"))
    started: list[int] = []

    def start(number: int, overrides: Sequence[str]) -> Stand:
        started.append(number)
        folder.note(Job(number, [*overrides], "finished"))
        return Stand(0)

    returns = follow(folder, GRID, 0, start, poll_s=0.0)
    assert started == [0, 2, 3]
    assert returns[1].return_value == 0.5


def test_a_search_does_not_repeat_what_failed(tmp_path: Path) -> None:
    """It has gone on from there: another result would make it propose other values than those of the later jobs."""
    folder = SweepFolder(tmp_path)
    folder.begin(["--multirun"], None)
    folder.note(Job(0, ["alpha=0.1"], "failed"))
    follow(folder, [["alpha=0.1"]], 0, lambda number, overrides: pytest.fail("started again"), poll_s=0.0)


class Executor:
    """Of submitit, whose jobs finish at once."""

    def __init__(self, folder: SweepFolder) -> None:
        self.sweep, self.folder, self.sent = folder, folder.path / "logs" / "%j", []

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self, launcher: object, overrides: list[str], key: str, number: int, *_: object) -> Any:
        self.sent.append(number)
        self.sweep.note(Job(number, overrides, "finished", objective=1.0))
        files = dict.fromkeys(("stderr", "submitted_pickle", "result_pickle"), self.sweep.path / "none")
        return SimpleNamespace(done=lambda: True, results=list, job_id="0", paths=SimpleNamespace(**files))


@pytest.mark.parametrize(("adaptive", "sent"), [(True, [2, 3]), (False, [0, 2, 3])])
def test_what_is_sent_off_is_what_is_followed(adaptive: bool, sent: list[int], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    folder = SweepFolder(tmp_path)
    folder.begin(["--multirun"], None if adaptive else GRID)
    folder.note(Job(0, GRID[0], "failed"))
    folder.note(Job(1, GRID[1], "finished"))
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "overrides": {"task": []}}})
    executor = Executor(folder)
    launch_submitted(SimpleNamespace(config=config), executor, GRID, 0)
    assert executor.sent == sent


@pytest.mark.parametrize(("when", "saves"), [("early", False), ("once", True), ("twice", False)])
def test_a_job_of_submitit_has_time_to_save(
    when: str, saves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit itself kills it after a second; asked again, it ends at once."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    executor = submitit.LocalExecutor(folder=tmp_path / "logs")
    with sweep_launch._in_their_own_sessions():
        submitted = executor.submit(saving_job.job, tmp_path)
    assert os.getsid(int(submitted.job_id)) != os.getsid(0)  # a Ctrl-C of the terminal does not reach it
    job = SubmittedHere(submitted, (tmp_path / "begun").exists)

    def wait_for(what: Callable[[], bool]) -> None:
        until = time.monotonic() + 60
        while not what():
            assert time.monotonic() < until
            time.sleep(0.1)

    if when != "early":
        wait_for((tmp_path / "started").exists)  # it does not listen yet
    job.stop()
    if when == "twice":
        wait_for(lambda: job.exit_code() is None and (tmp_path / "asked").exists())
        job.stop()
    wait_for(lambda: job.exit_code() is not None)
    assert job.exit_code() == 130
    assert (tmp_path / "saved").exists() == saves


def test_a_job_on_a_cluster_is_cancelled_there() -> None:
    cancelled: list[bool] = []
    Submitted(SimpleNamespace(cancel=lambda check: cancelled.append(check))).stop()
    assert cancelled == [False]


def test_ctrl_c_ends_what_runs_and_starts_nothing(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    stands: list[Stand] = []

    def start(number: int, overrides: Sequence[str]) -> Stand | None:
        if len(stands) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            return None
        stands.append(Stand(0, looks=1000))
        return stands[-1]

    with pytest.raises(SystemExit) as end:
        follow(folder, GRID, 0, start, poll_s=0.0)
    assert end.value.code == 130
    assert [stand.asked for stand in stands] == [1, 1]
    assert [job.status for job in folder.jobs().values()] == ["interrupted", "interrupted", "waiting", "waiting"]
    assert f"resume_sweep={folder.path}" in capsys.readouterr().out.replace("\n", "")
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_killed_jobs_run_says_so(folder: SweepFolder, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "r", OmegaConf.create({}))

    def start(number: int, overrides: Sequence[str]) -> Stand:
        folder.note(Job(number, [*overrides], "running", run=str(run.path)))
        run._close()
        return Stand(-signal.SIGKILL)

    follow(folder, GRID[:1], 0, start, poll_s=0.0)
    assert RunFolder.open(run.path, write=False).summary["status"] == "failed"
    assert "SIGKILL" in (run.path / "error.txt").read_text()


LISTED = """GPU 0: NVIDIA H200 (UUID: GPU-aaaa)
GPU 1: NVIDIA H200 (UUID: GPU-bbbb)
"""


@pytest.mark.parametrize(
    ("listed", "chosen", "found"),
    [
        (LISTED, None, ["0", "1"]),
        (LISTED, "3,5", ["3", "5"]),
        (LISTED, "", []),
        (LISTED, "-1", []),
        (f"{LISTED}  MIG 1g.18gb Device 0: (UUID: MIG-cccc)\n", None, ["MIG-cccc"]),
        (None, None, []),
    ],
)
def test_gpus_are_those_of_the_driver_unless_chosen(
    listed: str | None, chosen: str | None, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if listed is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{listed}END\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if listed is not None else str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == found


def test_each_place_in_the_queue_has_a_gpu_and_its_share_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    slots = [sweep_launch._slot(number, 4, ["0", "MIG-a"]) for number in range(4)]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "MIG-a", "0", "MIG-a"]
    assert {slot["OMP_NUM_THREADS"] for slot in slots} == {"4"}
    assert "CUDA_VISIBLE_DEVICES" not in sweep_launch._slot(0, 1, [])


def running(tmp_path: Path, **config: object) -> Path:
    run = RunFolder.create(tmp_path, "r", OmegaConf.create({"max_steps": 10, "epochs": None, **config}))
    for step in range(1, 5):
        spent = {"tokens/generated": 100 * step, "time/training_s": 2.0 * step}
        run._metrics.append({"step": step, "reward": step / 8, "time/total_s": 3.0 * step, **spent})
    run._close()
    return run.path


@pytest.mark.parametrize(
    ("config", "left_s"),
    [({}, 18.0), ({"budget_s": 10.0}, 3.0), ({"budget_tokens": 500}, 3.0), ({"max_steps": None}, None)],
)
def test_a_jobs_progress_is_read_from_its_metrics(config: dict, left_s: float | None, tmp_path: Path) -> None:
    steps = None if "max_steps" in config else 10
    assert progress_of(running(tmp_path, **config)) == Progress(4, steps, 0.5, left_s)


def test_the_table_shows_who_runs_first_where_there_are_too_many(tmp_path: Path) -> None:
    run = str(running(tmp_path))
    jobs = [Job(n, ["same=1", f"seed={n}"], "running" if n == 8 else "finished", run=run) for n in range(9)]
    jobs[3] = Job(3, ["same=1", "seed=3"], "failed", message="one\ntwo\nthree\nfour")
    screen = Screen(width=100, record=True, quiet=False)
    screen.print(table_of(jobs, "title", height=3))
    text = screen.export_text()
    assert "same=1" not in text
    assert "and 6 more" in text
    assert "18s" in text
    assert "three" in text
    assert "four" not in text
    assert "seed=1" not in text


def test_on_a_terminal_the_table_is_renewed_and_in_a_pipe_changes_are_lines() -> None:
    jobs = [Job(0, ["seed=0"], "running"), Job(1, ["seed=1"])]
    after = [Job(0, ["seed=0"], "failed", message="broke"), Job(1, ["seed=1"], "running")]
    for terminal in (True, False):
        file = io.StringIO()
        with LiveTable("title", Screen(file=file, force_terminal=terminal, width=80)) as table:
            threads = threading.active_count()
            for now in (jobs, jobs, after):
                table.show(now)
        assert threads == threading.active_count()  # a fork takes the lock of a thread that it doesn't have
        printed = file.getvalue()
        if terminal:
            assert printed.count("title") >= 3
            assert "broke" in printed
        else:
            assert printed.splitlines() == [
                "job 0 running  seed=0",
                "job 0 failed  seed=0: broke",
                "job 1 running  seed=1",
            ]


def test_secrets_that_are_swept_are_masked_in_what_hydra_wrote(folder: SweepFolder) -> None:
    (folder.path / "multirun.yaml").write_text("task:\n- +reward.api_key=aaaaaaaaaa,bbbbbbbbbb\n- seed=0,1\n")
    folder.mask(["+reward.api_key=aaaaaaaaaa,bbbbbbbbbb", "seed=0,1"])
    assert (folder.path / "multirun.yaml").read_text() == "task:\n- +reward.api_key=***\n- seed=0,1\n"
