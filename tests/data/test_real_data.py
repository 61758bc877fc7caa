"""Rows of published data sets."""

import json

from tests.data.helpers import everything, load
from tests.reference import real_data

LONG = {"max_prompt_tokens": None}


def test_tool_use_with_demonstrations():
    path = real_data("tooluse.json")
    found = everything(load(path, require=["golden_response"], **LONG))
    original = json.loads(path.read_text())
    assert len(found) == len(original) == 24
    assert [row["golden_response"] for row in found] == [row["golden_response"] for row in original]
    assert [row["prompt"][-1]["content"] for row in found] == [row["prompt"] for row in original]
    assert all(len(row["prompt"]) == 1 for row in found)


def test_chemistry_with_answers():
    splits = load(
        real_data("chemistry_train.jsonl"), eval_path=str(real_data("chemistry_eval.jsonl")), require=["answer"], **LONG
    )
    assert (len(splits.train), len(splits.eval)) == (60, 40)
    assert set(splits.train["answer"]) == set("ABCD")
    assert [message["role"] for message in splits.train[0]["prompt"]] == ["system", "user"]


def test_long_prompts_are_listed():
    splits = load(real_data("chemistry_train.jsonl"), on_bad_row="skip", max_prompt_tokens=1000)
    assert splits.bad_rows and len(splits.train) + len(splits.eval) + len(splits.bad_rows) == 60
    assert all("more than data.max_prompt_tokens=1000" in bad["reason"] for bad in splits.bad_rows)
