"""What a whole run shows, and leaves in its log."""

import json
import time
from pathlib import Path

import pytest

from selfdistill.runs.loggers.wandb_file import steps
from tests.command import command

RUN = [
    "experiment=sdpo", "max_steps=3", "hardware=cpu", "completions_per_step=8", "num_generations=4", "eval.every=2",
    "eval.max_rows=4", "eval.max_rows_per_suite=2", "show.completions_every=0", "hydra.run.dir=run",
]  # fmt: skip


@pytest.mark.long
def test_a_run_shows_what_differs_the_plan_and_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    outcome = command(RUN, tmp_path)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    order = ["differs from the defaults", "plan", "evaluation at step 0", "training", "completions at step 1"]
    order += ["evaluation at step 2", "completions at step 3", "evaluation at step 3", "before and after"]
    places = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert places == sorted(places)
    assert len(lines) < 110 and "\x1b" not in outcome.out
    assert [step for step in (1, 2, 3) if any(line.split()[:1] == [f"{step}/3"] for line in lines)] == [1, 2, 3]
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line for line in log if not line.startswith("warning:")] == lines

    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    tokens = [line["tokens/generated"] for line in metrics]
    per_step = [round(line["monitor/length_tokens"] * 8) for line in metrics[1:]]
    assert tokens == [0, *(sum(per_step[: i + 1]) for i in range(3))]
    seconds = [line["time/total_s"] for line in metrics]
    assert seconds == sorted(seconds) and seconds[0] > 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens_generated"] == tokens[-1]
    assert not {"entropy", "grad_norm", "step_time", "completions/mean_length", "time/wall_s"} & metrics[-1].keys()
    for _ in range(100):  # W&B's own process writes the last records after the run
        if len(steps(tmp_path / "run" / "wandb")) == 4:
            break
        time.sleep(0.1)
    assert steps(tmp_path / "run" / "wandb") == {0, 1, 2, 3}


@pytest.mark.long
def test_without_an_evaluation_no_empty_table_ends_the_run(tmp_path: Path) -> None:
    outcome = command(["debug=fast", "eval=none", "hardware=cpu", "logger=none", "hydra.run.dir=run"], tmp_path)
    assert outcome.code == 0, outcome.err
    assert "before and after" not in outcome.out and "metric" not in outcome.out
    assert "where everything lies" in outcome.out


@pytest.mark.long
@pytest.mark.parametrize("typed", [[], ["experiment=sdpo", "max_steps=30"]], ids=["the default", "make demo"])
def test_what_the_readme_runs_first_learns(typed: list[str], tmp_path: Path) -> None:
    """As measured there: from .310 of the held-out questions to .895, and to .855."""
    outcome = command([*typed, "logger=none", "hydra.run.dir=run"], tmp_path)
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == (30 if typed else 100)
    assert summary["eval"]["after"]["eval/accuracy"] > summary["eval"]["before"]["eval/accuracy"] + 0.1
