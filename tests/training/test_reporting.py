"""What the trainer reports to W&B when it is used from Python: the names of a run from the command line."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback

from selfdistill.training.reporting import StandardWandb, use_standard_names
from tests.runs.loggers import wandb_records
from tests.tiny import tiny_model


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()  # it reads the environment once a process
    yield tmp_path
    wandb.teardown()


@pytest.mark.long
def test_names_are_those_of_the_command_line(offline: Path) -> None:
    args = TrainingArguments(output_dir=str(offline), report_to=["wandb"], use_cpu=True)
    trainer = Trainer(model=tiny_model(), args=args)
    places = [type(callback) for callback in trainer.callback_handler.callbacks]
    use_standard_names(trainer)
    ours = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert ours == [StandardWandb if place is WandbCallback else place for place in places]
    callback = trainer.callback_handler.callbacks[ours.index(StandardWandb)]
    state, control = TrainerState(global_step=3, is_world_process_zero=True), TrainerControl()
    model: Any = SimpleNamespace(config=None, num_parameters=lambda: 1)
    callback.on_train_begin(args, state, control, model=model)
    logs = {"reward": 0.5, "entropy": 0.7, "distill/divergence": 0.2, "eval_reward": 0.6}
    callback.on_log(args, state, control, model=model, logs=logs)
    callback.on_log(args, state, control, model=model, logs={"train_runtime": 1.0, "train_loss": 0.5})
    wandb.finish()
    (path,) = offline.glob("wandb/offline-run-*/run-*.wandb")
    (row, *_) = wandb_records.history(wandb_records.complete(path))
    named = {name: value for name, value in row.items() if not name.startswith(("_", "train/"))}
    said = {"step": 3, "reward": 0.5, "monitor/entropy": 0.7, "distill/divergence": 0.2, "eval/reward": 0.6}
    assert {name: named.get(name) for name in said} == said
    assert "entropy" not in named
    assert wandb_records.metrics(path)["*"][0] == "step"
    assert wandb_records.summary(path)["train_loss"] == 0.5
