"""Checkpoints are whole or not there: their marker, their deletion, and what a step that fails puts back."""

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from selfdistill import Teacher
from selfdistill.teachers.weights import Ema
from selfdistill.training import checkpoints
from selfdistill.training.checkpoints import CompleteCallback, damage, mark, newest_checkpoint, remove, rotate
from tests.training.naive import Hint, make


def checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"checkpoint-{step}"
    (folder / "sharded").mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"moments" * step)
    (folder / "sharded" / "0.bin").write_bytes(b"weights")
    (folder / "README.md").write_text("a card")
    return folder


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.rsplit("-", 1)[1]) for path in (run / "checkpoints").iterdir())


def test_a_checkpoint_is_there_once_it_is_marked(tmp_path: Path) -> None:
    first, second = (checkpoint(tmp_path, step) for step in (2, 10))
    assert newest_checkpoint(tmp_path) is None
    mark(first)
    assert newest_checkpoint(tmp_path) == first
    mark(second)
    assert newest_checkpoint(tmp_path) == second


@pytest.mark.parametrize(
    ("file", "content", "wrong"),
    [
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("optimizer.pt", b"mom", "optimizer.pt has 3 bytes instead of 14"),
        ("sharded/0.bin", b"WEIGHTS", "sharded/0.bin is not as it was saved"),
        ("complete", b"", "complete cannot be read"),
        ("complete", b'{"files": 5}', "complete cannot be read"),
        ("README.md", b"", None),
    ],
)
def test_what_is_damaged_is_named(file: str, content: bytes | None, wrong: str | None, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 2)
    mark(folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    assert damage(folder) == wrong


@pytest.mark.parametrize(("keep", "best", "kept"), [(1, None, [8]), (2, None, [6, 8]), (1, 2, [2, 8]), (1, 3, [8])])
def test_the_newest_and_the_best_stay(keep: int, best: int | None, kept: list[int], tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        mark(checkpoint(tmp_path, step))
    checkpoint(tmp_path, 9)  # a kill left it half-written
    rotate(tmp_path / "checkpoints", keep, best)
    assert steps(tmp_path) == kept


def test_without_a_whole_one_nothing_is_deleted(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    rotate(tmp_path / "checkpoints", 1, None)
    assert steps(tmp_path) == [2]


def test_the_marker_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path, 2)
    mark(folder)
    monkeypatch.setattr("selfdistill.training.checkpoints.shutil.rmtree", lambda *_, **__: None)  # as if killed there
    remove(folder)
    assert newest_checkpoint(tmp_path) is None


def test_transformers_own_limit_waits_for_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's `save_total_limit`, from Python: the checkpoint before is there until the new one has everything."""
    there = []
    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *given: there.append(names(tmp_path)) or save(*given))
    args = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer, _ = make(tmp_path, args=args, teacher=Teacher(Ema(), Hint()))
    trainer.train()
    one, two, three = (f"checkpoint-{step}" for step in (1, 2, 3))
    assert there == [[one], [one, two], [two, three]]
    assert names(tmp_path) == [three]
    assert (tmp_path / three / "teacher.safetensors").is_file()
    assert trainer.args.save_total_limit == 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_the_new_one_is_whole_before_the_old_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark(checkpoint(tmp_path, 2))
    new = checkpoint(tmp_path, 4)
    seen = []
    monkeypatch.setattr("selfdistill.training.checkpoints.remove", lambda _: seen.append(newest_checkpoint(tmp_path)))
    args = TrainingArguments(output_dir=str(tmp_path / "checkpoints"), report_to=[], use_cpu=True)
    CompleteCallback(keep=1).on_save(args, TrainerState(global_step=4), TrainerControl())
    assert seen == [new]
