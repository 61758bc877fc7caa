import json

import pytest

from selfdistill.errors import UserError
from selfdistill.rewards import ToolCalls
from tests.reference import real_data

GOLDEN = '[{"Action": "getFacts", "Action_Input": "{\\"category\\": \\"habits\\", \\"limit\\": 3}"}]'
TWO = '[{"Action": "f", "Action_Input": "{\\"x\\": 1}"}, {"Action": "f", "Action_Input": "{\\"x\\": 2}"}]'


def judge(text, golden=GOLDEN, **arguments):
    return ToolCalls(**arguments)(prompts=["q"], completions=[text], golden_response=[[golden]])[0]


@pytest.mark.parametrize(
    "text",
    [
        GOLDEN,
        '[{"Action": "getFacts", "Action_Input": {"limit": 3, "category": "habits"}}]',
        '{"Action": "getFacts", "Action_Input": {"limit": "3", "category": "habits "}}',
        '[{"Action": "getFacts", "Action_Input": {"limit": "3.0", "category": "habits"}}]',
        "As [1] and {2} say: " + GOLDEN + " [done]",
        "I need facts.\n```json\n" + GOLDEN + "\n```\nDone.",
        'Thought: facts.\nAction: getFacts\nAction Input: {"category": "habits", "limit": 3}',
        'Action: getFacts\nAction_Input: {"category": "habits",\n "limit": 3.0}\nObservation: none',
    ],
)
def test_one_call_in_many_clothes(text):
    assert judge(text) == {"score": 1.0, "feedback": None}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('Action: getFact\nAction Input: {"category": "habits", "limit": 3}',
         "A call of getFacts is missing. getFact should not be called."),
        ('Action: getFacts\nAction Input: {"limit": 3}', "getFacts: the argument category is missing."),
        ('Action: getFacts\nAction Input: {"category": "habits", "limit": 3, "page": 1}',
         "getFacts: there should be no argument page."),
        ('Action: getFacts\nAction Input: {"category": "habitat", "limit": 3}',
         'getFacts: the argument category should not be "habitat".'),
        ('Action: getFacts\nAction Input: {"category": habits}',
         "The input of getFacts is not valid JSON: Expecting value at character 13."),
        ("Action: getFacts", '"Action: getFacts" is not followed by a line "Action Input:".'),
        ("Action: getFacts\nAction Input: [1]", "The input of getFacts is not a JSON object with one entry per"),
        ('[{"Action": "getFacts"', "The tool calls are not valid JSON: Expecting ',' delimiter at character 22."),
        ('[{"name": "getFacts"}]', 'A tool call has no "Action" with the name of a tool.'),
        ("I cannot do that.", "No tool call was found."),
        ('[{"Action": "getFacts", "Action_Input": "{}"}, {"Action": "getFacts"', "The tool calls are not valid JSON"),
        ("[" * 100_000, "The tool calls are not valid JSON"),
        ('[{"Action": "f", "Action_Input": {"x": ' + "1" * 5000 + "}}]", "The tool calls are not valid JSON"),
        ('Action: f\nAction Input: {"x": ' + "[" * 100_000, "The input of f is not valid JSON"),
        ('[{"Action": "getFacts", "Action_Input": {"x": ' + "[" * 400 + "]" * 400 + "}}]",
         "The arguments are nested in more than 50 levels."),
        ("[]", "No tool call was found."),
        ("", "No tool call was found."),
    ],
)  # fmt: skip
def test_feedback_names_what_differs(text, told):
    found = judge(text)
    assert found["score"] == 0.0
    assert found["feedback"].startswith(told)


def test_several_calls_in_any_order():
    swapped = json.dumps(json.loads(TWO)[::-1])
    assert judge(swapped, TWO)["score"] == 1.0
    assert judge(json.dumps(json.loads(TWO)[:1]), TWO)["feedback"] == "A call of f is missing."
    assert judge(json.dumps(json.loads(TWO) + json.loads(TWO)[:1]), TWO)["feedback"] == "f should not be called again."


def test_any_accepted_alternative_counts_and_the_nearest_is_compared():
    reward = ToolCalls(feedback="answer")
    other = GOLDEN.replace("3", "4")
    found = reward(
        prompts=["q"] * 3,
        completions=[other, GOLDEN.replace("3", "5"), GOLDEN],
        golden_response=[[TWO, GOLDEN, other]] * 2 + [[]],
    )
    assert found[0]["score"] == 1.0
    assert found[1]["feedback"].startswith("getFacts: the argument limit should not be 5. The expected calls are [")
    assert found[2] is None


def test_bounds_and_errors():
    assert len(judge("Action: " + "x" * 5000 + "\nAction Input: {}", feedback_characters=200)["feedback"]) == 200
    with pytest.raises(UserError, match=r"row 0 .*'golden_response'.*reward.answer_field"):
        judge("x", golden="no calls")


def test_real_tool_use():
    rows = json.loads(real_data("tooluse.json").read_text())
    golden = [row["golden_response"] for row in rows]

    def lines(calls):
        return "\n".join(f"Action: {c['Action']}\nAction Input: {c['Action_Input']}" for c in calls)

    def renamed(calls):
        return json.dumps([{**c, "Action": c["Action"] + "X"} for c in calls])

    parsed = [json.loads(responses[0]) for responses in golden]
    reward = ToolCalls()
    for completions, score in (
        ([responses[0] for responses in golden], 1.0),
        ([lines(calls) for calls in parsed], 1.0),
        ([renamed(calls) for calls in parsed], 0.0),
        ([row["prompt"] for row in rows], 0.0),
    ):
        found = reward(prompts=[None] * len(rows), completions=completions, golden_response=golden)
        assert [entry["score"] for entry in found] == [score] * len(rows)
        assert all((entry["feedback"] is None) == (score == 1.0) for entry in found)
