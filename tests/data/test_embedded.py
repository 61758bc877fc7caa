"""The data that comes with the package: whole, without overlap, and what its script writes."""

import filecmp
import importlib.resources
import json
import runpy
import sys
from pathlib import Path

import pytest

from selfdistill.errors import UserError
from tests.data.helpers import load

EMBEDDED = Path(str(importlib.resources.files("selfdistill.data"))) / "embedded"
SCRIPT = Path(__file__).parents[2] / "experiments" / "embedded_model" / "make_data.py"
COUNTS = {"half_known": (400, 200), "near": (400, 200), "far": (145, 37), "text": (300, 100)}


def read(name):
    return [json.loads(line) for line in (EMBEDDED / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", COUNTS)
def test_files_load(name):
    settings = {"prompt_tokens": 24, "chat_template": "none"} if name == "text" else {"require": ["answer"]}
    splits = load(f"embedded:{name}_train", eval_path=f"embedded:{name}_eval", **settings)
    assert (len(splits.train), len(splits.eval)) == COUNTS[name]
    prompts = [json.dumps(row["prompt"]) for side in (splits.train, splits.eval) for row in side]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", ["near", "far"])
def test_foreign_demonstrations_say_the_same_in_other_words(name):
    own, foreign = read(f"{name}_train"), read(f"{name}_foreign_train")
    assert [row["prompt"] for row in own] == [row["prompt"] for row in foreign]
    for mine, theirs in zip(own, foreign, strict=True):
        assert theirs["golden_response"] == [f"The answer is {mine['answer']}."] and mine["answer"] == theirs["answer"]


def test_retention_holds_a_hundred_questions_of_each_old_skill():
    rows = read("retention")
    suites = [row["suite"] for row in rows]
    assert {suite: suites.count(suite) for suite in suites} == dict.fromkeys(
        ["reverse", "shout", "initials", "last", "sort", "call"], 100
    )
    assert len({row["prompt"] for row in rows}) == 600
    trained = {row["prompt"] for name in ("half_known", "near", "far") for row in read(f"{name}_train")}
    assert not trained & {row["prompt"] for row in rows}


def test_the_script_writes_these_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    names = sorted(path.name for path in EMBEDDED.glob("*.jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert filecmp.cmpfiles(EMBEDDED, tmp_path, names, shallow=False)[1:] == ([], [])


def test_a_name_that_the_package_does_not_have():
    with pytest.raises(UserError, match=r"embedded:half_know_train: .*; did you mean half_known_train\?"):
        load("embedded:half_know_train")
