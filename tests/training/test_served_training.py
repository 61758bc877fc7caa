"""Training with a teacher behind a server: the same numbers as with a local one, asked for ahead, and its absence."""

import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from selfdistill import Distillation
from selfdistill.teachers import Teacher
from selfdistill.teachers.server import ServerTeacher
from selfdistill.teachers.weights import Base
from tests.command import Outcome, command
from tests.runs.test_resume import assert_same_end, numbers, only_run, status
from tests.teachers.server.stub_server import Reply, Request, StubServer
from tests.tiny import tiny_tokenizer
from tests.training.naive import Hint, by_length, lively, make


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with StubServer().speak_for(lively(), tiny_tokenizer()) as stub:
        yield stub


SIGNALS = {
    "forward": {"alpha": 0.0},
    "jensen_shannon": {"alpha": 0.5},
    "reverse": {"alpha": 1.0},
    "sampled_token": {"alpha": 1.0, "signal": "sampled_token"},
    "advantage": {"signal": "advantage"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("forward", "advantage") else pytest.mark.long) for n in SIGNALS]
)
def test_follows_the_run_with_the_same_teacher_at_hand(name: str, stub: StubServer, tmp_path: Path) -> None:
    """Full support. The server's numbers are rounded to float32."""
    ends, losses = [], []
    served = ServerTeacher(stub.url, "stub", context=Hint(), top_k=0 if "signal" in SIGNALS[name] else None)
    for teacher in (Teacher(Base(), Hint()), served):
        trainer, _ = make(
            tmp_path, args={"max_steps": 3}, teacher=teacher, distillation=Distillation(**SIGNALS[name]),
            reward_funcs=by_length,
        )  # fmt: skip
        trainer.train()
        ends.append(torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach())
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    served.close()
    start = torch.nn.utils.parameters_to_vector(lively().parameters()).detach()
    assert (ends[0] - start).norm() > 1e-3, "nothing was learnt"
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5 * float((ends[0] - start).abs().max()))


def test_later_micro_batches_are_asked_about_while_the_first_is_learnt_from(stub: StubServer, tmp_path: Path) -> None:
    served = ServerTeacher(stub.url, "stub", context=Hint(), top_k=3, max_concurrency=1)
    trainer, _ = make(tmp_path, args={"max_steps": 2}, teacher=served, distillation=Distillation(policy_weight=0.0))
    plain, under_way = trainer._distillation_loss, []

    def loss(*args: Any) -> Any:
        value = plain(*args)
        deadline = time.monotonic() + 10
        while len(stub.asked("completions")) % 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        under_way.append(len(stub.asked("completions")))
        return value

    trainer._distillation_loss = loss
    trainer.train()
    served.close()
    # A step learns from two micro-batches. Both are asked about before the first one's loss is over.
    assert under_way == [2, 2, 4, 4]
    rows = [json.dumps(row) for request in stub.asked("completions") for row in request.body["prompt"]]
    assert len(rows) == 2 * 5, "Hint shows something for 5 of 8 rollouts"


# ---- a server that goes away ----

COMMON = [
    "data=jsonl", "logger=none", "max_steps=10", "training.checkpoint_every=4", "num_generations=2", "hardware=cpu",
    "hardware.per_device_batch_size=4", "hardware.accumulation_steps=2", "hardware.threads=1", "reward=none",
    "eval=none",
    "rollout.max_completion_tokens=8", "learning_rate=0.003", "teacher=server", "teacher/context=demonstration",
    "teacher.model=stub", "teacher.top_k=5", "teacher.patience_s=1.0", "teacher.max_concurrency=1",
    "+training.arguments.steps_per_generation=4",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"add {i} {i + 1}", "golden_response": [f"it is {2 * i + 1}"]} for i in range(18)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(stub: StubServer, data: Path, folder: Path) -> Outcome:
    paths = [f"data.path={data}", f"data.eval_path={data}", f"output_dir={folder}", f"teacher.base_url={stub.url}"]
    return command([*COMMON, *paths], data.parent)


def failing_after(answered: int, fault: Reply) -> Callable[[Request], Reply | None]:
    """Answers so many requests for scores; the probe, which has one row, is not one of them."""
    count = 0

    def answer(request: Request) -> Reply | None:
        nonlocal count
        count += request.path.endswith("completions") and len(request.body["prompt"]) > 1
        return fault if count > answered else None

    return answer


@pytest.mark.long
@pytest.mark.parametrize("dies_after", [0, 11, 12])
def test_a_run_whose_server_dies_is_interrupted_and_goes_on_where_it_was(
    dies_after: int, stub: StubServer, data: Path, tmp_path: Path
) -> None:
    """Two steps share the rollouts; each micro-batch is a request, so the server dies at the start or amid of them."""
    assert train(stub, data, tmp_path / "unbroken").code == 0
    stub.answer = failing_after(dies_after, Reply(fault="reset"))
    outcome = train(stub, data, tmp_path / "broken")
    run = only_run(tmp_path / "broken")
    assert outcome.code != 0
    assert "Traceback" not in outcome.err
    assert stub.url.removesuffix("/v1").removeprefix("http://") in outcome.err
    assert f"resume={run}" in outcome.err
    assert status(run) == "interrupted"
    stub.answer = lambda request: None
    assert command([f"resume={run}"], data.parent).code == 0
    assert_same_end(run, only_run(tmp_path / "unbroken"))


@pytest.mark.long
@pytest.mark.parametrize(
    "fault", [Reply(raw=b"{"), Reply(400, {"error": {"message": "once"}})], ids=["malformed", "400"]
)
def test_a_run_whose_server_answers_nonsense_keeps_its_last_step(
    fault: Reply, stub: StubServer, data: Path, tmp_path: Path
) -> None:
    """Nothing has changed since the step began, and so nothing is lost, whatever kind of failure it was."""
    assert train(stub, data, tmp_path / "unbroken").code == 0
    stub.answer = failing_after(11, fault)
    outcome = train(stub, data, tmp_path / "broken")
    run = only_run(tmp_path / "broken")
    assert (outcome.code, status(run)) == (2, "failed")
    step = max(line["step"] for line in numbers(run))
    assert f"To go on after step {step}: python -m selfdistill.train resume={run}" in outcome.err
    stub.answer = lambda request: None
    assert command([f"resume={run}"], data.parent).code == 0
    assert_same_end(run, only_run(tmp_path / "unbroken"))


@pytest.mark.long
def test_runs_that_end_early_leave_no_thread_and_no_file_open(stub: StubServer, data: Path, tmp_path: Path) -> None:
    """A sweep has its runs in one process: finished ones, and ones that are refused once the server was asked."""

    def held() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    paths = [f"data.path={data}", f"output_dir={tmp_path}", f"teacher.base_url={stub.url}"]
    short = [*COMMON, *paths, "max_steps=1", "training.checkpoint_every=0"]
    assert command(short, tmp_path).code == 0
    before = held()
    for _ in range(2):
        assert command([*short, "teacher.model=stub2"], tmp_path).code == 2  # as the server says
        assert command(short, tmp_path).code == 0
    assert held() == before
