"""Training with a real vLLM server as the teacher."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.command import command
from tests.vllm.conftest import NAME, VllmServer

pytestmark = pytest.mark.timeout(900)
TOLERANCE = 2e-4  # nats: of the teacher's log-probabilities, and of what ten steps make of them
COMMON = [
    "experiment=sdft", "data=near", "max_steps=10", "eval=none", "logger=none", "hardware=cpu", "hardware.threads=1",
    "hardware.per_device_batch_size=8", "hardware.accumulation_steps=2", "rollout.max_completion_tokens=16",
    "training.checkpoint_every=0",
]  # fmt: skip


def steps(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of every step of a run."""
    folder.mkdir()
    outcome = command([*COMMON, *overrides], folder)
    # A server that dies may be said: whether a request is under way then, or comes while it is gone, is up to chance.
    unexpected = [line for line in outcome.err.splitlines() if "trying again for up to" not in line]
    assert (outcome.code, unexpected) == (0, [])
    (run,) = (folder / "outputs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def served(server: VllmServer) -> list[str]:
    return [
        "teacher=server", "teacher/context=demonstration", f"teacher.base_url={server.url}", f"teacher.model={NAME}",
    ]  # fmt: skip


def assert_same_curve(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) == 10
    for name in ("loss", "distill/divergence"):
        assert [step[name] for step in ours] == pytest.approx([step[name] for step in theirs], abs=TOLERANCE)
    assert theirs[0]["loss"] > 100 * TOLERANCE


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run whose teacher, the same model, is in the process."""
    weights = ["teacher/weights=model", "teacher.weights.name=embedded"]
    return steps(tmp_path_factory.mktemp("local") / "run", *weights)


def test_follows_the_run_with_the_same_teacher_at_hand(
    server: VllmServer, at_hand: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert_same_curve(steps(tmp_path / "run", *served(server)), at_hand)


def test_a_server_that_dies_while_the_student_trains_and_comes_back_changes_nothing(
    server: VllmServer, at_hand: list[dict[str, Any]], tmp_path: Path
) -> None:
    died_at: list[int] = []

    def kill_and_restart() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            written = [line for file in tmp_path.rglob("metrics.jsonl") for line in file.read_text().splitlines()]
            if len(written) >= 3:
                server.kill()
                died_at.append(len(written))
                time.sleep(2)
                server.start()
                return
            time.sleep(0.01)

    accident = threading.Thread(target=kill_and_restart)
    accident.start()
    run = steps(tmp_path / "run", *served(server), "teacher.patience_s=600.0")
    accident.join()
    assert died_at and died_at[0] < 10, "the server did not die while the student trained"
    assert_same_curve(run, at_hand)
