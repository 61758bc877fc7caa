"""What is trained on and what is evaluated."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdistill.data.rows import CheckedRow
from selfdistill.data.sources import RowSource
from selfdistill.data.split import Selection
from selfdistill.data.table import Table
from selfdistill.errors import UserError
from tests.data.helpers import jsonl, load, rows


def prompts(dataset):
    return [row["prompt"][0]["content"] for row in dataset]


def table(names):
    columns = [{"prompt": name, "answer": None, "golden_response": [], "id": str(i)} for i, name in enumerate(names)]
    source = RowSource("data.jsonl", "line", iter(()))
    return Table(source, [CheckedRow(i, c, frozenset()) for i, c in enumerate(columns, start=1)])


def test_split_is_seeded_and_complete(tmp_path):
    path = jsonl(tmp_path, rows(100))
    first, again, other = load(path, seed=3), load(path, seed=3), load(path, seed=4)
    assert prompts(first.eval) == prompts(again.eval) and prompts(first.train) == prompts(again.train)
    assert set(prompts(first.eval)) != set(prompts(other.eval))
    assert len(first.eval) == 10 and len(first.train) == 90
    assert not set(prompts(first.eval)) & set(prompts(first.train))


def test_order_of_the_rows_does_not_move_prompts(tmp_path):
    forward = load(jsonl(tmp_path, rows(50)))
    backward = load(jsonl(tmp_path, rows(50)[::-1], "backward.jsonl"))
    assert set(prompts(forward.eval)) == set(prompts(backward.eval))


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2), st.floats(0.01, 0.99), st.integers(-(2**70), 2**70))
@settings(max_examples=60, deadline=None)
def test_identical_prompts_never_land_on_both_sides(names, fraction, seed):
    try:
        train, evaluation = Selection(fraction, seed).split(table(names))
    except UserError:
        assert max(1, round(fraction * len(set(names)))) >= len(set(names))
        return
    sides = [[row.columns["prompt"] for row in side.rows] for side in (train, evaluation)]
    assert sides[0] and sides[1] and not set(sides[0]) & set(sides[1])
    assert sorted(sides[0] + sides[1]) == sorted(names)


@pytest.mark.parametrize("names, fraction, words", [("a", 0.1, "evaluation would be empty"), ("ab", 0.9, "nothing")])
def test_too_few_prompts_to_split(tmp_path, names, fraction, words):
    path = jsonl(tmp_path, [{"prompt": name} for name in names])
    with pytest.raises(UserError, match=words) as error:
        load(path, eval_fraction=fraction)
    assert "data.eval_path" in str(error.value)


def test_eval_path(tmp_path):
    splits = load(jsonl(tmp_path, rows(5)), eval_path=str(jsonl(tmp_path, [{"prompt": "new"}], "eval.jsonl")))
    assert len(splits.train) == 5 and prompts(splits.eval) == ["new"]


def test_shared_prompts_are_warned_of(tmp_path, caplog):
    evaluation = jsonl(tmp_path, [{"prompt": "new"}, {"prompt": "question 3"}], "eval.jsonl")
    with caplog.at_level(logging.WARNING):
        load(jsonl(tmp_path, rows(5)), eval_path=str(evaluation))
    assert "1 of 2 evaluation prompts" in caplog.text
    assert "eval.jsonl, line 2" in caplog.text and "data.jsonl, line 4" in caplog.text


def test_fewer_rows_are_a_part_of_more(tmp_path):
    path = jsonl(tmp_path, rows(100))
    few, more = load(path, max_train_rows=10, max_eval_rows=3), load(path, max_train_rows=30)
    assert len(few.train) == 10 and len(few.eval) == 3 and len(more.eval) == 10
    assert set(prompts(few.train)) < set(prompts(more.train))
    numbers = [int(prompt.split()[1]) for prompt in prompts(few.train)]
    assert numbers == sorted(numbers) and numbers != list(range(10))
