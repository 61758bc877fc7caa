import pytest

from experiments.embedded_model import world
from selfdistill.errors import UserError
from selfdistill.rewards import ExactMatch, exact


def call(reward, completions, answers, **more):
    return reward(prompts=["q"] * len(completions), completions=completions, answer=answers, **more)


def test_the_embedded_model_learned_this_wording():
    assert f"{exact.VERDICT} {exact.ANSWER}" == world.FEEDBACK_WITH_ANSWER
    assert exact.VERDICT == world.FEEDBACK_WITHOUT_ANSWER


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [1.0, 1.0, 0.0, 0.0, 0.0]),
        ({"normalize": "none"}, [1.0, 0.0, 0.0, 0.0, 0.0]),
        ({"normalize": "lower"}, [1.0, 1.0, 1.0, 0.0, 0.0]),
        ({"contains": True}, [1.0, 1.0, 0.0, 1.0, 0.0]),
    ],
)
def test_what_counts_as_equal(arguments, expected):
    assert call(ExactMatch(**arguments), ["Rose", " Rose\n", "rose", "a Rose.", ""], ["Rose"] * 5) == expected


def test_feedback_is_for_wrong_completions_alone():
    chat = [[{"role": "assistant", "content": text}] for text in ("lamp", "{rose} ")]
    assert call(ExactMatch(feedback="answer"), chat, ["lamp", "tree"]) == [
        {"score": 1.0, "feedback": None},
        {"score": 0.0, "feedback": "Your answer {rose} is wrong. The correct answer is tree."},
    ]
    assert call(ExactMatch(feedback="verdict"), ["rose"], ["tree"])[0]["feedback"] == "Your answer rose is wrong."


def test_golden_responses_are_accepted_where_there_is_no_answer():
    found = call(
        ExactMatch(), ["b", "b", "b", "a"], ["a", None, None, ["a", "b"]], golden_response=[["b"], ["a", "b"], [], []]
    )
    assert found == [0.0, 1.0, None, 1.0]
    assert ExactMatch()(prompts=["q"], completions=["b"], golden_response=[["b"]]) == [1.0]


def test_an_empty_answer_is_not_contained_in_everything():
    assert call(ExactMatch(contains=True), ["text", ""], ["", ""]) == [0.0, 1.0]


def test_long_texts_are_cut_in_the_middle():
    told = call(ExactMatch(feedback="answer", feedback_characters=20), ["x" * 500 + "end"], ["y"])[0]["feedback"]
    assert told == f"Your answer {'x' * 11}...{'xxx'}end is wrong. The correct answer is y."


def test_errors_name_key_and_column():
    for key, value in (("normalize", "upper"), ("feedback", "yes")):
        with pytest.raises(UserError, match=f"reward.{key}"):
            ExactMatch(**{key: value})
    with pytest.raises(UserError, match=r"'solution'.*answer.*reward.answer_field"):
        call(ExactMatch(answer_field="solution"), ["a"], ["a"])
