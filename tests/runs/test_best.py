"""The best checkpoint by a metric becomes the model; a run may be as long as its epochs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from selfdistill.errors import UserError
from selfdistill.evaluation.evaluator import Evaluator
from selfdistill.runs import session
from selfdistill.runs.best import WINDOW, KeepBest, load_best
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.processes import Processes
from selfdistill.training.checkpoints import mark
from tests.command import command
from tests.training.naive import by_length, make

RUN = [
    "hardware=cpu", "logger=none", "completions_per_step=4", "num_generations=2", "rollout.max_completion_tokens=4",
    "eval.max_rows=4", "eval.max_rows_per_suite=1", "learning_rate=0.01", "hydra.run.dir=run",
]  # fmt: skip


def followed(metric: str, values: list[float], folder: Path) -> tuple[list[int], TrainerState]:
    """The steps at which a checkpoint is asked for, and the state at the end."""
    args = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    run = RunFolder.create(folder, "r", OmegaConf.create({}))
    run.finish("finished")
    callback, state = KeepBest(metric, run), TrainerState()
    callback.on_train_begin(args, state, TrainerControl())
    saved = []
    for step, value in enumerate(values, start=1):
        control, state.global_step = TrainerControl(), step
        callback.on_log(args, state, control, logs={"loss": value, "reward": value})
        callback.on_evaluate(args, state, control, metrics={"eval/accuracy": value, "eval/forgetting": value})
        saved += [step] * control.should_save
    return saved, state


@pytest.mark.parametrize(
    ("metric", "values", "saved"),
    [
        ("eval/accuracy", [0.1, 0.3, 0.2, 0.3, 0.4], [1, 2, 5]),
        ("eval/forgetting", [0.3, 0.4, 0.1], [1, 3]),
        ("reward", [0.0] * WINDOW + [1.0] * WINDOW + [0.0] * 5, [WINDOW, 2 * WINDOW]),
    ],
)
def test_a_better_value_is_saved(metric: str, values: list[float], saved: list[int], tmp_path: Path) -> None:
    steps, state = followed(metric, values, tmp_path)
    assert (steps, state.best_global_step) == (saved, saved[-1])


def test_a_metric_that_is_not_logged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keep_best=eval/acuracy: .*did you mean eval/accuracy"):
        followed("eval/acuracy", [0.1], tmp_path)


@pytest.mark.parametrize("harm", [None, "cut", "gone"])
def test_the_last_weights_stay_where_the_best_are_damaged(harm: str | None, tmp_path: Path) -> None:
    checkpoint, loaded = tmp_path / "checkpoints" / "checkpoint-2", []
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    mark(checkpoint)
    if harm == "cut":
        (checkpoint / "model.safetensors").write_bytes(b"wei")
    if harm == "gone":
        shutil.rmtree(checkpoint)
    trainer, _ = make(tmp_path / "trainer", reward_funcs=by_length)
    trainer.state.best_global_step, trainer.state.global_step = 2, 4
    trainer._load_best_model = lambda: loaded.append(1)
    wrong = {"cut": "model.safetensors has 3 bytes instead of 7", "gone": "complete cannot be read"}
    expected = (None, f"checkpoint-2 is damaged: {wrong[harm]}") if harm else (2, None)
    assert load_best(trainer, tmp_path, Processes(cpu=True)) == expected
    assert loaded == ([] if harm else [1])


@pytest.mark.long
@pytest.mark.parametrize("damaged", [False, True])
def test_the_best_step_becomes_the_model(damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of four evaluations says the most. Where its checkpoint is damaged, the last step's weights stay."""

    def load(trainer: Any, run: Path, *others: Any) -> Any:
        file = run / "checkpoints" / "checkpoint-2" / "model.safetensors"
        file.write_bytes(bytes(file.stat().st_size) if damaged else file.read_bytes())
        return load_best(trainer, run, *others)

    monkeypatch.setattr(session, "load_best", load)
    said, evaluate = iter([0.0, 0.2, 0.9, 0.5, 0.1, 0.9]), Evaluator.evaluate

    def better(self: Evaluator, *arguments: Any) -> Any:
        found = evaluate(self, *arguments)
        found.metrics["eval/accuracy"] = next(said)
        return found

    monkeypatch.setattr(Evaluator, "evaluate", better)
    line = ["keep_best=eval/accuracy", "eval.every=1", "max_steps=4", "training.keep_checkpoints=1"]
    done = command([*RUN, *line, "training.checkpoint_every=1"], tmp_path)
    assert done.code == 0, done.err
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    if damaged:
        why = "the best by eval/accuracy, checkpoint-2 is damaged: model.safetensors is not as it was saved"
        assert f"{why}: model/ is that of the last one" in done.out
        assert "best" not in summary
    else:
        assert "model/ is that of step 2, the best by eval/accuracy: 0.900" in done.out
        assert (summary["best"]["step"], summary["eval"]["after"]["eval/accuracy"]) == (2, 0.9)
    kept = f"checkpoints/checkpoint-{4 if damaged else 2}"
    model, best = (load_file(run / name / "model.safetensors") for name in ("model", kept))
    assert all(model[name].equal(best[name]) for name in model)


@pytest.mark.long
def test_epochs_in_place_of_steps(tmp_path: Path) -> None:
    """Five rows to train on, two prompts a step: two steps an epoch."""
    rows = "".join(f'{{"prompt": "add {i} 1", "answer": "{i + 1}"}}\n' for i in range(6))
    (tmp_path / "my.jsonl").write_text(rows)
    data = ["data=jsonl", "data.path=my.jsonl", "data.eval_fraction=0.2", "eval=none"]
    done = command([*RUN[:5], *RUN[7:], *data, "epochs=1.5"], tmp_path)
    assert done.code == 0, done.err
    assert "3 steps" in done.out
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
