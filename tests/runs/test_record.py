"""What the main process writes down, where others fail it."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from safetensors import SafetensorError

from selfdistill import export
from selfdistill.errors import UserError
from selfdistill.runs import record
from selfdistill.runs.loggers import WandbLogger
from selfdistill.training import build
from tests.command import command
from tests.runs.test_resume import only_run, status

pytestmark = pytest.mark.long
FAST = ["debug=fast", "eval=none", "hardware=cpu", "hardware.per_device_batch_size=8", "output_dir=o"]


def test_a_logger_that_cannot_start_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "o/wandb")

    monkeypatch.setattr(WandbLogger, "start", start)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quick = ["max_steps=1", "training.checkpoint_every=0", "eval=none", "output_dir=o"]
        assert command([*quick, "hardware=cpu", "logger=wandb"], tmp_path).code == 0
    assert status(only_run(tmp_path / "o")) == "finished"
    assert (
        len([w for w in said if "The logger failed" in str(w.message) and "Permission denied" in str(w.message)]) == 1
    )


def test_an_export_that_cannot_be_written_harms_no_run_and_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is over then: nothing is trained again."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("selfdistill.models.export.merged_16bit.Merged16bit.write", full)
        outcome = command([*FAST, "logger=none", "training.checkpoint_every=2", "export=merged_16bit"], tmp_path)
    run = only_run(tmp_path / "o")
    assert (outcome.code, status(run)) == (0, "finished")
    assert "No space left on device" in outcome.out and "Traceback" not in outcome.out + outcome.err
    assert "again: python -m selfdistill.export" in outcome.out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert command([f"run={run}", "export=merged_16bit"], tmp_path, export).code == 0
    assert status(run) == "finished" and (run / "export" / "merged_16bit").is_dir()
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert steps == [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("when", ["save_model", "close"])
def test_a_folder_that_goes_in_the_end_is_said(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model is written, which has an error of its own for that, or after all was written."""
    done = getattr(record.Record, when)

    def and_gone(self: record.Record, *arguments: object) -> None:
        if when == "save_model":
            shutil.rmtree(self.folder.path)
            raise SafetensorError("I/O error: No such file or directory")
        done(self, *arguments)
        shutil.rmtree(self.folder.path)

    monkeypatch.setattr(record.Record, when, and_gone)
    outcome = command(["debug=fast", "eval=none", "logger=none", "hardware=cpu", "hydra.run.dir=run"], tmp_path)
    assert outcome.code == 2
    assert "run is gone" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_run_that_is_refused_before_it_begins_says_why_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is removed, which is no fault of anyone's."""

    def refuse(*_: object) -> None:
        raise UserError("model.name=x: no such model.")

    monkeypatch.setattr(build, "build", refuse)
    outcome = command(["debug=fast", "eval=none", "logger=none", "hardware=cpu"], tmp_path)
    assert (outcome.code, outcome.err) == (2, "selfdistill: model.name=x: no such model.\n")
