import numpy as np
import pytest
import torch

from selfdistill.errors import UserError
from selfdistill.rewards import Mix, PolicyScorer, normalise
from selfdistill.rewards.exact import ExactMatch
from tests.rewards.fakes import CharTokenizer, TableModel


def test_every_accepted_form():
    entries = [
        1,
        0.5,
        True,
        None,
        {"score": 1.0, "feedback": "why"},
        {"score": None},
        {"score": 2, "feedback": ""},
    ]
    scores, feedback = normalise(entries, "f", 7)
    assert scores == [1.0, 0.5, 1.0, None, 1.0, None, 2.0]
    assert feedback == [None] * 4 + ["why", None, None]
    assert normalise(torch.tensor([1.0, 0.0]), "f", 2)[0] == [1.0, 0.0]
    assert normalise(np.array([1, 2]), "f", 2)[0] == [1.0, 2.0]
    assert normalise([np.float32(0.5), torch.tensor(2.0)], "f", 2)[0] == [0.5, 2.0]
    assert normalise((), "f", 0) == ([], [])


def test_last_feedback_of_the_callable():
    def function():
        return None

    function.last_feedback = ["wrong", None]
    assert normalise([0.0, 1.0], "f", 2, function)[1] == ["wrong", None]
    assert normalise([{"score": 0.0, "feedback": "own"}, 1.0], "f", 2, function)[1] == ["own", None]
    function.last_feedback = ["wrong"]
    with pytest.raises(UserError, match=r"function f: its last_feedback is .* list of 2"):
        normalise([0.0, 1.0], "f", 2, function)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (None, "function f returned NoneType None; return one entry"),
        (0.5, "returned float 0.5"),
        ("good", "returned str 'good'"),
        ({"score": 1}, "returned dict"),
        ([1.0], "1 entries for 2"),
        ([1.0, "2"], "function f, row 1: the score is str '2'"),
        ([1.0, {"feedback": "x"}], 'row 1: .* has no "score"'),
        ([1.0, {"score": "1"}], "row 1: the score is str"),
        ([{"score": 1.0, "feedback": 3}, 1.0], "row 0: the feedback is int 3"),
        ([1.0, float("inf")], "row 1: the score is inf"),
        ([1.0, float("nan")], "row 1: the score is nan, .* or None for a completion that cannot be judged"),
        (torch.tensor([float("nan"), 1.0]), "row 0: the score is nan"),
        ([1.0, -float("inf")], "row 1: the score is -inf"),
        ([1.0, [1.0]], r"row 1: the score is list \[1.0\]"),
        ([(1.0, "x"), 1.0], "row 0: the score is tuple"),
        ([1.0, torch.tensor([1.0, 2.0])], "row 1: the score is Tensor"),
        ([1.0, 1j], "row 1: the score is complex"),
    ],
)
def test_anything_else_is_refused_by_name_and_row(result, told):
    with pytest.raises(UserError, match=told):
        normalise(result, "f", 2)


def test_mix_lists_its_parts_and_sums_them():
    def half(prompts, completions, **columns):
        return [0.5, None, None]

    mix = Mix({"exact": ExactMatch(feedback="answer"), "half": half}, {"exact": 2.0})
    assert [(name, weight) for name, _, weight in mix.parts] == [("exact", 2.0), ("half", 1.0)]
    found = mix(prompts=["q"] * 3, completions=["a", "b", "c"], answer=["a", "a", None])
    assert [entry["score"] for entry in found] == [2.5, 0.0, None]
    assert found[1]["feedback"] == "Your answer b is wrong. The correct answer is a."


def test_mix_binds_what_can_be_bound():
    class Needs(ExactMatch):
        def bind(self, scorer):
            self.scorer = scorer

    needs, scorer = Needs(), PolicyScorer(TableModel(torch.zeros(28, 28)), CharTokenizer())
    Mix({"a": needs, "b": lambda **_: []}).bind(scorer)
    assert needs.scorer is scorer


def test_mix_refuses_nonsense():
    with pytest.raises(UserError, match=r"reward.rewards is empty"):
        Mix({})
    with pytest.raises(UserError, match=r"reward.weights names b, which reward.rewards does not have"):
        Mix({"a": ExactMatch()}, {"b": 1.0})
    with pytest.raises(UserError, match=r"reward.rewards.a is 3"):
        Mix({"a": 3})
