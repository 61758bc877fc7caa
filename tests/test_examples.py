"""The example scripts run as they stand."""

import importlib.util
import inspect
import runpy
import sys
from pathlib import Path

import pytest

from selfdistill.models.loading import load_model
from tests.reference import ROOT


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Runs a script with these arguments, as its own main program, in this process."""

    def call(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(ROOT / "experiments" / "examples" / name), run_name="__main__")

    return call


def test_basic(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("basic_sdpo.py", "--steps", "2", "--output", str(tmp_path))
    assert (tmp_path / "model.safetensors").exists()
    assert str(tmp_path) in capsys.readouterr().out


def test_basic_with_a_model_of_ones_own(run, tmp_path: Path) -> None:
    """Where there is no GPU it trains on the CPU."""
    model, tokenizer = load_model(name="embedded", tuning="full")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "mine")
    run("basic_sdpo.py", "--steps", "1", "--model", str(tmp_path / "mine"), "--output", str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_rich_feedback(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("sdpo_rich_feedback.py", "--steps", "1", "--output", str(tmp_path), "--allow-code-execution", "--unsandboxed")
    printed = capsys.readouterr().out
    assert "what the tests said:" in printed
    assert "Feedback on an earlier, unsuccessful attempt" in printed


def test_code_is_not_run_unasked(run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--allow-code-execution"):
        run("sdpo_rich_feedback.py", "--output", str(tmp_path))


def unsloth_is_here() -> bool:
    return importlib.util.find_spec("unsloth") is not None


@pytest.mark.skipif(unsloth_is_here(), reason="unsloth is installed")
def test_without_unsloth_it_says_so(run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unsloth cannot be used here"):
        run("sdpo_with_unsloth.py", "--data", "rows.jsonl", "--output", str(tmp_path))


@pytest.mark.skipif(not unsloth_is_here(), reason="unsloth is not installed")
def test_calls_of_unsloth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_ALLOW_CPU", "1")
    from unsloth import FastLanguageModel

    from experiments.examples import sdpo_with_unsloth as example

    inspect.signature(FastLanguageModel.from_pretrained).bind("name", **example.LOADING)
    inspect.signature(FastLanguageModel.get_peft_model).bind(object(), **example.ADAPTER)
