"""Tasks one after the other: each stage starts where the one before ended, and a kill costs no stage that is done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from selfdistill import config
from selfdistill.comparison import load_runs
from selfdistill.errors import UserError
from selfdistill.evaluation.transfer import AccuracyMatrix
from selfdistill.runs.sequence import first_stage, stage_config
from selfdistill.runs.sequence_report import REPORT, write_report
from tests.command import command, composed
from tests.reference import ROOT

TASKS = ["half_known", "first_word", "long_sort"]
SHORT = [
    "sequence=skills", "hardware=cpu", "logger=none", "completions_per_step=8", "eval.max_rows=12",
    "eval.max_rows_per_suite=4", "training.checkpoint_every=1", "show.completions_every=0", "learning_rate=1e-3",
]  # fmt: skip


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def folders(sequence: Path) -> list[Path]:
    return sorted(path for path in sequence.iterdir() if path.is_dir() and path.name.startswith(sequence.name))


def composed_sequence(*overrides: str) -> tuple[Any, config.Run]:
    cfg = composed(["sequence=skills", *overrides])
    return cfg, config.check(cfg, ["sequence=skills", *overrides])


def test_each_stage_is_a_run_on_one_task_that_asks_the_others_too() -> None:
    cfg, run = composed_sequence("experiment=sft", "export=merged_16bit", "+data@probes.far=far")
    for number, task in enumerate(TASKS):
        start = Path(f"before-{number}") if number else None
        stage, checked = stage_config(cfg, run, number, start)
        assert config.check(stage) == checked, "what is recorded is what is trained"
        assert checked.data["path"] == f"embedded:{task}_train"
        assert set(checked.probes) == {"far", *TASKS} - {task} and not checked.tasks
        assert checked.model.name == (str(start) if start else "embedded")
        assert (checked.export is None) == (task != TASKS[-1]), "the end is exported"
    assert list(cfg.tasks) == TASKS, "the sequence's own configuration stays"
    alone = composed(["experiment=sft"])
    assert first_stage(alone, config.check(alone)) == (alone, config.check(alone))


def test_an_adapter_is_handed_on_as_an_adapter() -> None:
    cfg, run = composed_sequence("model.tuning=lora")
    stage, checked = stage_config(cfg, run, 1, Path("before"))
    assert (checked.model.name, checked.model.adapter_path) == ("embedded", "before")
    assert config.check(stage) == checked


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=near"], "data is set but nothing reads it: tasks are trained in its place"),
        (["data.max_train_rows=5"], "data.max_train_rows is set but nothing reads it"),
        (["eval=none"], "leaves a sequence of tasks nothing to report: write eval=default"),
        (["+tasks.more=near"], r"tasks.more is no data set: .*\+data@tasks.more=OPTION"),
        (["+data@probes.x=near", "probes.x.path=gone.jsonl"], None),
    ],
)
def test_what_a_sequence_refuses(overrides: list[str], message: str | None) -> None:
    if message is None:
        from selfdistill.runs.preflight import look_for_files

        with pytest.raises(UserError, match=r"probes\.x\.path"):
            look_for_files(composed_sequence(*overrides)[1])
        return
    with pytest.raises(UserError, match=message):
        composed_sequence(*overrides)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = command(SHORT, tmp_path)
    assert outcome.code == 2 and "a sequence is for one process" in outcome.err
    assert outcome.left == set()


def test_a_task_that_cannot_be_judged_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "bare.jsonl").write_text("".join(f'{{"prompt": "{n}"}}\n' for n in range(16)))
    tasks = ["+data@tasks.mine=jsonl", "tasks.mine.path=bare.jsonl", "+data@tasks.near=near"]
    outcome = command([*SHORT[1:], *tasks, "max_steps=1", "reward=inverse_loss"], tmp_path)
    assert outcome.code == 2, outcome.err
    assert "tasks.mine: none of its evaluation rows can be judged" in outcome.err
    assert not any(left.startswith("outputs/") for left in outcome.left), outcome.left


def test_the_report_draws_the_matrix(tmp_path: Path) -> None:
    rows = [dict.fromkeys(TASKS, 0.1), dict.fromkeys(TASKS, 0.6)]
    write_report(tmp_path, AccuracyMatrix(TASKS, rows))
    assert {file.name for file in tmp_path.iterdir()} == set(REPORT)
    assert read(tmp_path / "sequence.json")["accuracy"] == [[0.1] * 3, [0.6] * 3]
    assert "| after half_known | 0.600 | 0.600 | 0.600 | 0.600 |" in (tmp_path / "sequence.md").read_text()
    assert (tmp_path / "sequence.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.long
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_stage_starts_where_the_one_before_ended(tuning: str, tmp_path: Path) -> None:
    run = [*SHORT, "experiment=sft", "max_steps=2", f"model.tuning={tuning}", "hydra.run.dir=sequence"]
    outcome = command(run, tmp_path)
    assert outcome.code == 0, outcome.err
    assert "accuracy by stage and task" in outcome.out and "backward transfer" in outcome.out
    sequence = tmp_path / "sequence"
    stages = [read(folder / "summary.json")["eval"] for folder in folders(sequence)]
    assert [folder.name.split("-")[-1] for folder in folders(sequence)] == TASKS
    named: list[dict[str, dict[str, float]]] = []
    for task, stage in zip(TASKS, stages, strict=True):
        named.append({side: {**m, f"eval/task/{task}": m["eval/accuracy"]} for side, m in stage.items()})
    kept = [name for name in named[0]["after"] if name not in ("eval/accuracy", "eval/forgetting")]
    assert len(kept) == 3 + 7
    for earlier, later in zip(named, named[1:], strict=False):
        assert {name: earlier["after"][name] for name in kept} == {name: later["before"][name] for name in kept}
    assert any(named[0]["before"][name] != named[-1]["after"][name] for name in kept), "nothing was learned"

    matrix = [named[0]["before"], *(stage["after"] for stage in named)]
    accuracies = [[row[f"eval/task/{task}"] for task in TASKS] for row in matrix]
    assert read(sequence / "sequence.json")["accuracy"] == accuracies
    summary = read(sequence / "summary.json")
    assert (summary["status"], summary["step"]) == ("finished", 6)
    assert summary["eval"]["after"]["eval/accuracy"] == pytest.approx(sum(accuracies[-1]) / 3)
    lines = [json.loads(line) for line in (sequence / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]

    found = load_runs(sequence)
    assert len(found.runs) == 1, "a sequence is compared as one run"
    assert found.runs["eval/task_forgetting"].notna().all()
    weights = "model.safetensors" if tuning == "full" else "adapter_model.safetensors"
    assert (sequence / "model" / weights).samefile(folders(sequence)[-1] / "model" / weights)

    again = command(["resume=sequence"], tmp_path)
    assert again.code == 2 and "all of its tasks are trained" in again.err
    assert "model.name=sequence/model" in again.err


@pytest.mark.long
def test_a_kill_resumes_at_the_stage_it_was_in(tmp_path: Path) -> None:
    """With the numbers of a sequence that nothing interrupted; the stage that was done is not trained again."""
    run = [*SHORT, "experiment=sft", "max_steps=3", "~data@tasks.long_sort"]
    assert command([*run, "hydra.run.dir=whole"], tmp_path).code == 0
    words = [sys.executable, "-m", "selfdistill.train", *run, "hydra.run.dir=killed"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        second = tmp_path / "killed" / "killed-2-first_word"
        for _ in range(3000):
            if (second / "checkpoints" / "checkpoint-1" / "complete").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log.txt").read_text()[-3000:]
    first = tmp_path / "killed" / "killed-1-half_known" / "summary.json"
    before = first.read_text()
    refused = command(["resume=killed", "max_steps=5"], tmp_path)
    assert refused.code == 2 and "max_steps cannot be changed when a sequence" in refused.err
    outcome = command(["resume=killed"], tmp_path)
    assert outcome.code == 0, outcome.err
    assert "stage 2 of 2" in outcome.out and "stage 1 of 2" not in outcome.out
    assert first.read_text() == before
    assert read(second / "summary.json")["resumed"]
    whole, killed = (read(tmp_path / name / "sequence.json") for name in ("whole", "killed"))
    assert whole == killed
    ends = [read(tmp_path / name / "summary.json")["eval"] for name in ("whole", "killed")]
    assert ends[0] == ends[1]


@pytest.mark.long
def test_a_stage_that_is_refused_is_mended_and_resumed(tmp_path: Path) -> None:
    """Files that cannot be read are refused before anything is trained; rows that do not fit, at their own stage."""
    rows = [{"prompt": f"a{i}", "answer": "b", "golden_response": ["b"]} for i in range(40)]
    good, bad, bare = (tmp_path / f"{name}.jsonl" for name in ("good", "bad", "bare"))
    good.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    bad.write_text(good.read_text() + "{no json\n")
    bare.write_text("".join(f"{json.dumps({'prompt': row['prompt']})}\n" for row in rows))
    run = [*SHORT, "experiment=sft", "max_steps=1", "~data@tasks.first_word", "~data@tasks.long_sort"]
    run += ["+data@tasks.mine=jsonl", "tasks.mine.eval_path=good.jsonl", "hydra.run.dir=sequence"]
    refused = command([*run, "tasks.mine.path=bad.jsonl"], tmp_path)
    assert refused.code == 2 and "bad.jsonl" in refused.err
    assert refused.left == set()
    checked = command([*run, "tasks.mine.path=good.jsonl", "check=true"], tmp_path)
    assert checked.code == 0 and "half_known_train" in checked.out, checked.err
    assert checked.left == set()

    stopped = command([*run, "tasks.mine.path=bare.jsonl"], tmp_path)
    assert stopped.code == 2 and "bare.jsonl" in stopped.err
    assert "the sequence goes on with: python -m selfdistill.train resume=sequence" in stopped.out
    assert read(tmp_path / "sequence" / "summary.json")["status"] == "failed"
    assert [folder.name for folder in folders(tmp_path / "sequence")] == ["sequence-1-half_known"]
    bare.write_text(good.read_text())
    outcome = command(["resume=sequence"], tmp_path)
    assert outcome.code == 0, outcome.err
    assert read(tmp_path / "sequence" / "summary.json")["status"] == "finished"
    assert len(read(tmp_path / "sequence" / "sequence.json")["accuracy"]) == 3
