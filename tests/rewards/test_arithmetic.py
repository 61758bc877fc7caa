import pytest

from selfdistill.errors import UserError
from selfdistill.rewards import Arithmetic
from selfdistill.rewards.arithmetic import last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 42", 42), ("12 + 30 = 42.", 42), ("-7", -7), ("minus: −7", -7), ("5-3", 3), ("x = -3.5", -3.5),
        ("$1,234.50", 1234.5), ("1, 2", 2), ("1,2", 2), ("2e3", 2000), ("5%", 5), ("#### 18", 18), (r"\boxed{-6}", -6),
        (".5", 0.5), ("0.25", 0.25), ("(3)", 3), ("12,3456", 3456),
        ("3/4", 0.75), ("it is -3 / 4.", -0.75), (r"\frac{3}{4}", 0.75), (r"-\frac{3}{4}", -0.75),
        ("24/7 = 3.43", 3.43),
        ("on 1/2/2024", 2024), ("3/0", 0), ("none", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    assert last_number(text) == number


def test_scores_and_feedback():
    found = Arithmetic()(
        prompts=["q"] * 4, completions=["so 7.0", "8", "seven", "7"], answer=["7", "#### 7", "7", None]
    )
    assert found == [
        {"score": 1.0, "feedback": None},
        {"score": 0.0, "feedback": "Your result 8 is wrong."},
        {"score": 0.0, "feedback": "Your answer holds no number."},
        None,
    ]
    told = Arithmetic(feedback="answer")(prompts=["q"], completions=["8"], answer=[7])[0]["feedback"]
    assert told == "Your result 8 is wrong. The correct result is 7."
    assert Arithmetic(feedback="none", tolerance=0.01)(prompts=["q"], completions=["3.14"], answer=["3.1416"]) == [1.0]


def test_an_answer_without_a_number_is_an_error():
    with pytest.raises(UserError, match=r"row 0 .*'seven'.*reward.answer_field"):
        Arithmetic()(prompts=["q"], completions=["7"], answer=["seven"])
