"""Where a run comes from, and that one command repeats it."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from selfdistill import config
from selfdistill.runs.provenance import DIFF, PROVENANCE, differences, provenance_files
from tests.command import command, composed

SECRET = "hf_abcdefghijkl"
FAST = ["debug=fast", "hardware=cpu", "completions_per_step=8", "eval.max_rows=4", "eval.max_rows_per_suite=1"]


def _git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a changed file and data, in which a run is started."""
    _git(tmp_path, "init", "-q")
    (tmp_path / "mine.py").write_text("old = 1\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "first")
    (tmp_path / "mine.py").write_text(f"new = 2  # {SECRET}\n")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _written(folder: Path) -> tuple[dict[str, Any], config.Run]:
    cfg = composed(["data=jsonl", "data.path=rows.jsonl", "seed=5", f"+training.arguments.hub_token={SECRET}"])
    run = config.check(cfg)
    for name, text in provenance_files(folder / "run", cfg, run).items():
        (folder / "run" / name).write_text(text)
    return json.loads((folder / "run" / PROVENANCE).read_text()), run


def test_what_is_written_down(repository: Path) -> None:
    found, _ = _written(repository)
    assert found["seed"] == 5
    assert found["data"]["rows.jsonl"]["bytes"] == (repository / "rows.jsonl").stat().st_size
    assert {"rows.jsonl", "embedded:retention"} == found["data"].keys()
    assert found["model"].keys() == {"model.safetensors"}
    assert found["versions"]["torch"] and found["hardware"]["cores"]
    git = found["git"]["folder"]
    assert len(git["commit"]) == 40 and git["changed"] and not git["diff_cut"]
    assert git["root"] == str(repository)
    patch = (repository / "run" / DIFF).read_text()
    assert "-old = 1\n+new = 2  # ***" in patch
    assert SECRET not in (repository / "run" / PROVENANCE).read_text()


def test_what_is_not_as_it_was(repository: Path) -> None:
    found, run = _written(repository)
    assert differences(repository / "run", run) == []
    (repository / "rows.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    found["versions"]["torch"] = "1.0"
    (repository / "run" / PROVENANCE).write_text(json.dumps(found))
    versions, data = differences(repository / "run", run)
    assert versions.startswith("torch ") and versions.endswith("here, 1.0 there")
    assert data == "data: rows.jsonl is another file than it was"
    (repository / "run" / PROVENANCE).unlink()
    assert "is not known" in differences(repository / "run", run)[0]


def test_outside_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    monkeypatch.chdir(tmp_path)
    found, _ = _written(tmp_path)
    assert found["git"]["folder"] is None


@pytest.mark.long
def test_one_command_repeats_a_run(tmp_path: Path) -> None:
    """On the CPU the numbers are the same, whatever the defaults of the day are."""
    first = command(["experiment=sdpo", "seed=3", "logger=none", *FAST, "output_dir=first"], tmp_path)
    assert first.code == 0, first.err
    (run,) = (tmp_path / "first").iterdir()
    second = command([f"repeat=first/{run.name}", "output_dir=second"], tmp_path)
    assert (second.code, second.err) == (0, ""), second.err
    (again,) = (tmp_path / "second").iterdir()
    assert _numbers(again) == _numbers(run)
    assert len(_numbers(run)) > 2
    assert "not as in" not in second.out
    card = (again / "model" / "README.md").read_text()
    assert "- method: `sdpo`" in card
    assert "| eval/accuracy |" in card
    assert (again / "model" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    refused = command([f"repeat=first/{run.name}", "seed=4"], tmp_path)
    assert (refused.code, refused.left) == (2, set())
    assert "seed cannot be changed when a run is repeated" in refused.err


def _numbers(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "time" not in name} for line in lines]
