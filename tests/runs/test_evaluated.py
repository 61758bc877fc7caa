import json
from pathlib import Path

from selfdistill.evaluation.evaluator import Item
from selfdistill.runs.evaluated import write_items

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_with_its_answer_and_verdict(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    write_items(path, 0, [Item(None, "7", MESSAGES, "42 ü", 1.0), Item("old", "0", "p" * 9000, "", None)])
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert first == {"step": 0, "suite": None, "row": "7", "prompt": "s\n\nu", "answer": "42 ü", "verdict": 1.0}
    assert (second["suite"], second["verdict"], len(second["prompt"])) == ("old", None, 2000)


def test_steps_that_are_repeated_are_replaced(tmp_path: Path) -> None:
    path, item = tmp_path / "evaluation.jsonl", Item(None, "0", "p", "a", 0.0)
    for step in (0, 5, 10, 5):
        write_items(path, step, [item])
    assert steps(path) == [0, 5]


def test_it_is_bounded_and_keeps_the_first_and_the_newest(tmp_path: Path) -> None:
    path, item = tmp_path / "evaluation.jsonl", Item(None, "0", "p", "a" * 500, 0.0)
    for step in range(10):
        write_items(path, step, [item], most_bytes=2500)
    assert steps(path) == [0, 7, 8, 9]
    assert path.stat().st_size <= 2500
