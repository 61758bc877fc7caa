import json
import math
import os
import shutil
import signal
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from selfdistill.errors import UserError
from selfdistill.runs.folder import PromptSample, RunFolder

CONFIG = OmegaConf.create({"seed": 3, "model": {"name": "tiny", "copy": "${seed}"}})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "time/total_s"} for record in records]


@pytest.fixture
def run(tmp_path):
    run = RunFolder.create(tmp_path / "outputs", "grpo_supervised", CONFIG)
    yield run
    run.finish("finished")


def test_the_id_names_the_folder_and_the_config_is_resolved(run, tmp_path):
    assert run.path.parent == tmp_path / "outputs"
    assert run.path.name == run.run_id
    date, clock, name, tail = run.run_id.split("-")
    assert (len(date), len(clock), name, len(tail)) == (8, 6, "grpo_supervised", 4)
    assert run.config == {"seed": 3, "model": {"name": "tiny", "copy": 3}}
    assert "${" not in (run.path / "config.yaml").read_text()


def test_a_name_cannot_leave_the_folder(tmp_path):
    run = RunFolder.create(tmp_path, "../../a b/ü", CONFIG)
    assert run.path.parent == tmp_path
    assert "/" not in run.run_id
    run.finish("finished")


def test_ids_do_not_collide(tmp_path, monkeypatch):
    tails = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr("selfdistill.runs.folder.secrets.token_hex", lambda count: next(tails))
    monkeypatch.setattr("selfdistill.runs.folder.datetime", FrozenTime)
    first, second = (RunFolder.create(tmp_path, "same", CONFIG) for _ in range(2))
    assert (first.run_id[-4:], second.run_id[-4:]) == ("aaaa", "bbbb")
    for run in (first, second):
        run.finish("finished")


class FrozenTime:
    @staticmethod
    def now(zone):
        from datetime import datetime

        return datetime(2026, 11, 21, 6, 15, 2, tzinfo=zone)


def test_many_runs_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: RunFolder.create(tmp_path, "same", CONFIG), range(24)))
    assert len({run.run_id for run in runs}) == 24
    for run in runs:
        run.finish("finished")


def test_metrics_are_plain_json_and_one_line_a_step(run):
    run.log_metrics(0, {"eval/accuracy": 0.25})
    run.log_metrics(1, {"loss": math.nan, "kl": math.inf, "reward": np.float32(0.5), "grad": torch.tensor(2.0)})
    run.log_metrics(1, {"eval/accuracy": 0.5, "loss": 1.0})
    run.log_metrics(2, {"count": np.int64(4), "kind": "x", "many": [1.0, -math.inf]})
    assert without_time(lines(run.path / "metrics.jsonl")) == [
        {"step": 0, "eval/accuracy": 0.25},
        {"step": 1, "loss": 1.0, "kl": None, "reward": 0.5, "grad": 2.0, "eval/accuracy": 0.5},
        {"step": 2, "count": 4, "kind": "x", "many": [1.0, None]},
    ]
    assert run.metrics()[-1]["time/total_s"] >= 0


def test_a_merged_line_that_is_shorter_leaves_nothing_behind(run):
    run.log_metrics(1, {"text": "long " * 100})
    run.log_metrics(1, {"text": "short"})
    assert without_time(lines(run.path / "metrics.jsonl")) == [{"step": 1, "text": "short"}]


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "rew', '{"step": 3}{"st', "\x00\x00\x00", "not json\n", '{"ste\n\x00\n', "[1]\n"]
)
def test_a_torn_last_line_is_repaired(tmp_path, torn):
    run = RunFolder.create(tmp_path, "r", CONFIG)
    run.log_metrics(1, {"reward": 1.0})
    run.log_metrics(2, {"reward": 2.0})
    run.finish("interrupted")
    file = run.path / "metrics.jsonl"
    file.write_text(file.read_text() + torn)

    assert [line["step"] for line in RunFolder.open(run.path, write=False).metrics()] == [1, 2]
    again = RunFolder.open(run.path)
    again.log_metrics(3, {"reward": 3.0})
    again.finish("finished")
    assert [(line["step"], line["reward"]) for line in lines(file)] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_last_line_without_its_newline_is_kept(tmp_path):
    run = RunFolder.create(tmp_path, "r", CONFIG)
    run.log_metrics(1, {"reward": 1.0})
    run.finish("interrupted")
    file = run.path / "metrics.jsonl"
    file.write_text(file.read_text().rstrip("\n"))
    again = RunFolder.open(run.path)
    again.log_metrics(2, {"reward": 2.0})
    again.finish("finished")
    assert [line["step"] for line in lines(file)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_named(run):
    run.log_metrics(1, {})
    (run.path / "metrics.jsonl").write_text('{"step": 1}\noops\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        run.metrics()


def test_truncation_drops_later_steps_of_both_files(run):
    for step in (0, 1, 2, 3):
        run.log_metrics(step, {"reward": step})
        run.log_completions(step, [{"prompt": "p", "completion": "c\n", "reward": step, "advantage": None}] * 2)
    assert run.truncate_metrics(1) == 2 + 4
    run.log_metrics(2, {"reward": 20})
    run.log_completions(2, [{"completion": "new"}])
    assert [(line["step"], line["reward"]) for line in lines(run.path / "metrics.jsonl")] == [(0, 0), (1, 1), (2, 20)]
    assert [line["step"] for line in lines(run.path / "completions.jsonl")] == [0, 0, 1, 1, 2]
    assert run.truncate_metrics(2) == 0


def test_the_summary(run):
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["status"] == "running"
    assert summary["run_id"] == run.run_id
    assert summary["versions"]["torch"].startswith("2.")
    assert {"transformers", "trl", "peft", "python"} <= set(summary["versions"])
    assert summary["command"]
    assert summary["started"].endswith("+00:00")
    assert 0.01 < summary["peak_memory_gib"]["rss"] < 100
    run.update_summary(eval={"before": {"accuracy": 0.1}, "after": {"accuracy": math.nan}})
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["eval"] == {"before": {"accuracy": 0.1}, "after": {"accuracy": None}}
    assert summary["status"] == "running"


def test_the_commit_of_the_current_folder(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)

    def state():
        run = RunFolder.create(tmp_path / "o", "r", CONFIG)
        run.finish("finished")
        return run.summary["git"]

    assert state() is None
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@localhost"]
    (repository / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *command], check=True)
    assert len(state()["commit"]) == 40
    assert state()["changed"] is False
    (repository / "file").write_text("2")
    assert state()["changed"] is True


def test_a_failure_leaves_its_traceback_and_a_resume_puts_it_aside(tmp_path):
    run = RunFolder.create(tmp_path, "r", CONFIG)
    try:
        raise RuntimeError("the cause")
    except RuntimeError:
        run.finish("failed", traceback=traceback.format_exc())
    assert run.summary["status"] == "failed"
    text = (run.path / "error.txt").read_text()
    assert text.startswith("Traceback")
    assert "the cause" in text
    again = RunFolder.open(run.path)
    assert again.summary["status"] == "running"
    assert len(again.summary["resumed"]) == 1
    again.finish("finished")
    assert not (run.path / "error.txt").exists()
    assert "the cause" in (run.path / "error-before-resume.txt").read_text()


def test_wall_time_and_peak_memory_go_on_after_a_kill(tmp_path):
    run = RunFolder.create(tmp_path, "r", CONFIG)
    run.update_summary()
    summary = json.loads((run.path / "summary.json").read_text())
    summary["peak_memory_gib"] = {"rss": 77.0, "cuda": 5.0}
    run.finish("interrupted")
    (run.path / "summary.json").write_text(json.dumps({**summary, "wall_s": 100.0}))
    (run.path / "metrics.jsonl").write_text('{"step": 1, "time/total_s": 150.5}\n')
    again = RunFolder.open(run.path)
    again.truncate_metrics(0)
    again.finish("finished")
    assert 150.5 <= again.summary["wall_s"] < 200
    assert again.summary["peak_memory_gib"] == {"rss": 77.0, "cuda": 5.0}


def test_what_is_added_after_the_end_costs_no_wall_time(run):
    run.finish("finished")
    wall_s = run.summary["wall_s"]
    run.update_summary(export={"lora": "export/lora"})
    written = json.loads((run.path / "summary.json").read_text())
    assert written["export"] == {"lora": "export/lora"}
    assert written["wall_s"] == wall_s


def test_no_run_s_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.yaml and summary\.json are missing"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r": summary\.json is missing"):
        RunFolder.open(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(UserError, match=r"summary\.json is no run's summary"):
            RunFolder.open(tmp_path)


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="No run's folder can be made"):
        RunFolder.create(tmp_path / "file", "r", CONFIG)


def test_a_name_that_is_too_long_is_one_message(tmp_path):
    with pytest.raises(UserError, match="No run's folder can be made in .*File name too long"):
        RunFolder.create(tmp_path / ("x" * 300), "r", CONFIG)
    with pytest.raises(UserError, match="is no run's folder: File name too long"):
        RunFolder.open(tmp_path / ("x" * 300))


@pytest.mark.parametrize("last", ["lock", "config.yaml", "summary.json"])
def test_a_start_that_is_killed_leaves_no_half_of_a_run(last, tmp_path, monkeypatch):
    """What is being made has a hidden name until it can be resumed; the next start removes it."""
    program = f"""
import os
from pathlib import Path
from omegaconf import OmegaConf
from selfdistill.runs import folder
real = folder._lock
def lock(path):
    file = real(path)
    os._exit(9)
if {last!r} == "lock":
    folder._lock = lock
write = Path.write_text
def write_text(path, content, **how):
    if path.name == {last!r}:
        os._exit(9)
    return write(path, content, **how)
Path.write_text = write_text
folder.RunFolder.create(Path({str(tmp_path)!r}), "killed", OmegaConf.create({{}}))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".") and "killed" in left.name
    run = RunFolder.create(tmp_path, "r", CONFIG)
    run.finish("finished")
    assert list(tmp_path.iterdir()) == [run.path]


def test_what_a_kill_left_half_written_goes_at_the_resume(tmp_path):
    run = RunFolder.create(tmp_path, "r", CONFIG)
    run.log_metrics(7, {"reward": 1.0})
    run._close()  # as a kill does, without a last summary
    (run.path / ".summary.json.partial-host-77").write_text("{")
    (run.path / ".model.partial-host-77").mkdir()
    (run.path / "export" / ".lora.partial-host-77").mkdir(parents=True)
    assert json.loads((run.path / "summary.json").read_text())["step"] == 0
    assert RunFolder.open(run.path, write=False).summary["step"] == 7
    again = RunFolder.open(run.path)
    again.finish("interrupted")
    assert again.summary["step"] == 7
    hidden = {str(path.relative_to(run.path)) for path in run.path.rglob(".*")}
    assert hidden == {".lock", "export/.lora.partial-host-77"}  # another machine may be exporting


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_run_whose_folder_is_gone_is_not_finished(how, tmp_path):
    run = RunFolder.create(tmp_path / "outputs", "r", CONFIG)
    run.log_metrics(1, {"reward": 1.0})
    if how == "deleted":
        shutil.rmtree(run.path)
    else:
        run.path.rename(tmp_path / "elsewhere")
    assert not run.is_there
    with pytest.raises(UserError, match="is gone: it was deleted or moved while the run was writing to it"):
        run.log_metrics(2, {"reward": 2.0})
    for status in ("finished", "failed"):
        with pytest.raises(UserError, match="is gone"):
            run.finish(status)
    assert not run.path.exists()


def test_a_full_disk_keeps_a_place_for_the_end(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path, "r", CONFIG)
    assert (run.path / ".reserve").stat().st_size >= 1 << 16
    monkeypatch.setattr(
        "selfdistill.runs.folder.write_atomically",
        lambda path, content: (_ for _ in ()).throw(OSError(28, "No space left"))
        if (run.path / ".reserve").exists() else path.write_text(content),
    )  # fmt: skip
    with pytest.raises(OSError, match="No space"):
        run.update_summary(step=3)
    run.finish("failed", traceback="No space left")
    assert json.loads((run.path / "summary.json").read_text())["status"] == "failed"
    assert (run.path / "error.txt").read_text() == "No space left"


def test_what_a_resumed_run_is_given_anew_is_kept(tmp_path):
    config = OmegaConf.create({"max_steps": 4, "token": "sk-secret-value"})
    run = RunFolder.create(tmp_path, "r", config)
    run.finish("finished")
    again = RunFolder.open(run.path)
    again.change_config({"max_steps": 400})
    again.finish("finished")
    assert OmegaConf.load(run.path / "config.yaml") == {"max_steps": 400, "token": "***"}


def test_one_writer_at_a_time(run):
    with pytest.raises(UserError, match="in use"):
        RunFolder.open(run.path)
    reader = RunFolder.open(run.path, write=False)
    assert reader.metrics() == []
    with pytest.raises(ValueError, match="not open for writing"):
        reader.log_metrics(1, {})
    run.finish("finished")
    RunFolder.open(run.path).finish("finished")


def test_kill_9_loses_at_most_the_line_in_writing(tmp_path):
    program = f"""
import os, sys
from pathlib import Path
from omegaconf import OmegaConf
from selfdistill.runs.folder import RunFolder
run = RunFolder.create(Path({str(tmp_path)!r}), "killed", OmegaConf.create({{}}))
for step in range(1, 1_000_000):
    run.log_metrics(step, {{"text": "x" * 500}})
    if step == 200:
        print(run.path, flush=True)
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    path = Path(process.stdout.readline().strip())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    run = RunFolder.open(path)
    steps = [line["step"] for line in run.metrics()]
    assert len(steps) >= 200
    assert steps == list(range(1, len(steps) + 1))
    assert run.summary["status"] == "running"
    run.finish("interrupted")


def test_prompts_show_what_was_seen_and_whether_the_ids_agree(run):
    right = PromptSample("<|user|>a ``` b", "cba", [4, 5, 6], "<|user|>a<|hint|>", [4, 5, 6])
    assert run.write_prompts([right, PromptSample("s", "c", [1])])
    text = (run.path / "prompts.md").read_text()
    assert "````text\n<|user|>a ``` b\n````" in text
    assert "<|user|>a<|hint|>" in text
    assert "3 token ids: 4 5 6" in text
    assert "the same token ids" in text
    assert "carries no teacher's signal" in text
    assert not run.write_prompts([right, PromptSample("s", "c", [1, 2], "t", [1, 3])])
    assert "OTHER token ids: 1 3" in (run.path / "prompts.md").read_text()


def test_bad_rows(run):
    run.write_bad_rows([])
    assert not (run.path / "bad_rows.jsonl").exists()
    run.write_bad_rows([{"file": Path("a.jsonl"), "line": 3, "reason": "no prompt"}])
    assert lines(run.path / "bad_rows.jsonl") == [{"file": "a.jsonl", "line": 3, "reason": "no prompt"}]


def test_secrets_reach_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "from-the-environment")
    config = OmegaConf.create({"teacher": {"api_key": "sk-written-out"}, "other": {"hub_token": "${oc.env:MY_KEY}"}})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "x", "teacher.api_key=sk-written-out", "+password=pw"])
    run = RunFolder.create(tmp_path, "r", config)
    run.finish("failed", traceback="RuntimeError: server refused sk-written-out")
    for file in run.path.iterdir():
        content = file.read_text()
        assert "sk-written-out" not in content, file
        assert "from-the-environment" not in content, file
        assert "pw" not in content.split("\n")[0], file
    assert "password=***" in run.summary["command"]
    assert run.config.other.hub_token == "from-the-environment"
    assert run.config.teacher.api_key == "***"
    assert run.hides(["x", "teacher.api_key=sk-written-out"])
    assert not run.hides(["x", "max_steps=3"])


def test_reading_a_folder_imports_nothing_heavy():
    heavy = ("torch", "transformers", "wandb")
    program = f"import selfdistill.runs.folder, sys; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
