import json

import pytest

from selfdistill.errors import UserError
from selfdistill.rewards import MultipleChoice
from tests.reference import real_data


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<reasoning>\nA or B?\n</reasoning>\n<answer>\nC\n</answer>", "C"),
        ("<answer>b</answer>", "B"),
        ("<answer>(D).</answer>", "D"),
        ("<answer>A</answer> no, <answer>B</answer>", "B"),
        ("<answer>A", "A"),
        ("The answer is B.", "B"),
        ("**C**", "C"),
        ("(D)", "D"),
        ("A: no. B: yes, so B", "B"),
        ("It is B, because CC(C)C(=O)N and C1CCC1 are no acids", "B"),
        ("I choose B, because A ignores friction.", "B"),
        ("I would not choose A, so D.", "D"),
        ("B, because A ignores friction.", "B"),
        ("A because B ignores friction: the answer is A because", "A"),
        ("The answer is B. A good way to see it: D is too large.", "B"),
        ("The answer is not A. It is D", "D"),
        (r"so \boxed{B}, not C", "B"),
        (r"\boxed{\text{(B)}}", "B"),
        ("Answer: b", "B"),
        ("**Answer:** B", "B"),
        ("Answer: a good one would be C", "C"),
        ("`B`", "B"),
        ("<answer>B) 42 J</answer>", "B"),
        (r"<answer>\boxed{B}</answer>", "B"),
        ("<answer>A good way</answer>", None),
        ("<answer>A, B</answer>", None),
        ("The answer is A or B", None),
        ("BAD CASE", None),
        ("<answer>B or C</answer>", None),
        ("<answer>E</answer>", None),
        ("", None),
    ],
)
def test_the_choice_is_found(text, letter):
    assert MultipleChoice().choice(text)[0] == letter


def test_feedback_names_the_form_or_the_choice():
    texts = ["<answer>A</answer>", "<answer>B</answer>", "no idea", "<answer>both</answer>"]
    found = MultipleChoice()(prompts=["q"] * 4, completions=texts, answer=["A"] * 4)
    assert [entry["score"] for entry in found] == [1.0, 0.0, 0.0, 0.0]
    assert found[0]["feedback"] is None
    assert found[1]["feedback"] == "Your choice B is wrong."
    assert found[2]["feedback"].startswith(
        "No choice was found. End with <answer>X</answer>, where X is one of A, B, C, D"
    )
    assert "not a single letter" in found[3]["feedback"]
    told = MultipleChoice(feedback="answer")(prompts=["q"], completions=["B"], answer=["A"])[0]["feedback"]
    assert told == "Your choice B is wrong. The correct choice is A."
    assert MultipleChoice(feedback="none")(prompts=["q"] * 2, completions=["A", "B"], answer=["A", None]) == [1.0, None]
    assert MultipleChoice(require_tags=True, feedback="none")(prompts=["q"], completions=["A"], answer=["A"]) == [0.0]


def test_errors_name_row_and_key():
    with pytest.raises(UserError, match=r"row 1 .*'E'.*reward.choices"):
        MultipleChoice()(prompts=["q"] * 2, completions=["A"] * 2, answer=["A", "E"])
    with pytest.raises(UserError, match=r"reward.choices"):
        MultipleChoice(choices="A, B")


def test_real_questions():
    rows = [json.loads(line) for line in real_data("chemistry_eval.jsonl").read_text().splitlines()]
    answers = [row["answer"] for row in rows]
    # The options, with their formulas, stand before the choice; the wrong one is the next letter.
    right = [f"<reasoning>\n{row['prompt']}\n</reasoning>\n<answer>\n{row['answer']}\n</answer>" for row in rows]
    bare = [f"{row['prompt']}\n\nSo it is {row['answer']}." for row in rows]
    wrong = [f"{row['prompt']}\n<answer>{'ABCD'['ABCD'.index(row['answer']) - 1]}</answer>" for row in rows]
    reward = MultipleChoice(feedback="none")
    for completions, score in ((right, 1.0), (bare, 1.0), (wrong, 0.0)):
        assert reward(prompts=[None] * len(rows), completions=completions, answer=answers) == [score] * len(rows)
