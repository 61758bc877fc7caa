"""The example scripts run as they stand."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "experiments" / "examples"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], env=environment, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip


def test_basic(tmp_path: Path) -> None:
    done = run("basic_sdpo.py", "--steps", "2", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").exists()
    assert str(tmp_path) in done.stdout


def test_rich_feedback(tmp_path: Path) -> None:
    done = run("sdpo_rich_feedback.py", "--steps", "1", "--output", str(tmp_path), "--allow-code-execution")
    assert done.returncode == 0, done.stderr
    assert "what the tests said:" in done.stdout
    assert "Feedback on an earlier, unsuccessful attempt" in done.stdout


def test_code_is_not_run_unasked(tmp_path: Path) -> None:
    done = run("sdpo_rich_feedback.py", "--output", str(tmp_path))
    assert done.returncode == 1
    assert "--allow-code-execution" in done.stderr


def unsloth_is_here() -> bool:
    return importlib.util.find_spec("unsloth") is not None


@pytest.mark.skipif(unsloth_is_here(), reason="unsloth is installed")
def test_without_unsloth_it_says_so(tmp_path: Path) -> None:
    done = run("sdpo_with_unsloth.py", "--data", "rows.jsonl", "--output", str(tmp_path))
    assert done.returncode == 1
    assert "unsloth cannot be used here" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not unsloth_is_here(), reason="unsloth is not installed")
def test_calls_of_unsloth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_ALLOW_CPU", "1")
    from unsloth import FastLanguageModel, PatchFastRL

    spec = importlib.util.spec_from_file_location("sdpo_with_unsloth", EXAMPLES / "sdpo_with_unsloth.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    inspect.signature(FastLanguageModel.from_pretrained).bind("name", **example.LOADING)
    inspect.signature(FastLanguageModel.get_peft_model).bind(object(), **example.ADAPTER)
    inspect.signature(PatchFastRL).bind("GRPO", FastLanguageModel)
