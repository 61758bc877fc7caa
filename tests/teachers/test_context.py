"""What the teacher sees: whom it teaches, from which peer, and in which words."""

import itertools
from collections import Counter

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from selfdistill.config.conf import CONF
from selfdistill.errors import UserError
from selfdistill.rollout import Rollouts
from selfdistill.teachers import templates
from selfdistill.teachers.context import Answer, Demonstration, Feedback, NoContext, without_thinking
from tests.tiny import tiny_tokenizer

SHORT = {
    "template": "{prompt}|{solution}|{feedback}",
    "solution_block": "S:{solution}",
    "feedback_block": "F:{feedback}",
}


def rollouts(scores, completions=None, feedback=(), prompts=None, group=4, **columns) -> Rollouts:
    n = len(scores)
    completions = completions or [f"c{i}" for i in range(n)]
    return Rollouts(
        prompts=prompts or [f"q{i // group}" for i in range(n)],
        completions=completions,
        completion_ids=[list(range(len(text))) for text in completions],
        columns=columns,
        scores=scores,
        feedback=feedback,
        num_generations=group,
    )


def seen(context, batch) -> list:
    return context.prompts(batch, tiny_tokenizer())


# Who is distilled, and from what


@pytest.mark.parametrize(
    ("success", "notes", "options", "expected"),
    [
        # (who succeeded, who has feedback, options, what the four are shown)
        ("1000", "0000", {}, [None, "q0|S:c0|", "q0|S:c0|", "q0|S:c0|"]),
        ("1000", "0000", {"exclude_own_success": False}, ["q0|S:c0|"] * 4),
        ("0110", "0000", {}, ["q0|S:c1|", "q0|S:c2|", "q0|S:c1|", "q0|S:c1|"]),
        ("0000", "0000", {}, [None] * 4),
        ("0000", "0101", {}, [None, "q0||F:n1", None, "q0||F:n3"]),
        ("1111", "1111", {}, ["q0|S:c1|", "q0|S:c0|", "q0|S:c0|", "q0|S:c0|"]),
        ("1000", "1111", {}, [None, "q0|S:c0|", "q0|S:c0|", "q0|S:c0|"]),
        ("1000", "1111", {"feedback_when": "always"}, ["q0||F:n0", "q0|S:c0|", "q0|S:c0|", "q0|S:c0|"]),
        ("1000", "1101", {"feedback_with_solution": True}, [None, "q0|S:c0|F:n1", "q0|S:c0|", "q0|S:c0|F:n3"]),
        ("1000", "1111", {"use_solution": False}, [None, "q0||F:n1", "q0||F:n2", "q0||F:n3"]),
        ("0100", "1111", {"use_feedback": False}, ["q0|S:c1|", None, "q0|S:c1|", "q0|S:c1|"]),
    ],
)
def test_who_is_shown_what_by_hand(success, notes, options, expected):
    batch = rollouts([float(s) for s in success], feedback=[f"n{i}" if int(n) else None for i, n in enumerate(notes)])
    assert seen(Feedback(**SHORT, **options), batch) == expected


def shown_by_rule(i, success, notes, own, when, beside, use_solution, use_feedback):
    """The rule stated once more, row by row and by exclusion."""
    others = {j for j in range(4) if success[j]}
    if own:
        others.discard(i)
    if not use_solution:
        others = set()
    note = bool(notes[i])
    if not use_feedback or (when == "failed" and success[i]) or (others and not beside):
        note = False
    if not others and not note:
        return None
    return "q0|" + (f"S:c{min(others)}" if others else "") + "|" + (f"F:n{i}" if note else "")


@pytest.mark.parametrize("success", list(itertools.product([0, 1], repeat=4)))
def test_who_is_shown_what_in_all_combinations(success):
    rules = itertools.product([True, False], ["failed", "always"], [True, False], [(1, 1), (1, 0), (0, 1)])
    for own, when, beside, (use_solution, use_feedback) in rules:
        context = Feedback(
            **SHORT,
            exclude_own_success=own,
            feedback_when=when,
            feedback_with_solution=beside,
            use_solution=bool(use_solution),
            use_feedback=bool(use_feedback),
            max_solution_tokens=None,
            max_feedback_tokens=None,
        )
        for notes in itertools.product([0, 1], repeat=4):
            batch = rollouts(
                [float(s) for s in success], feedback=[f"n{i}" if n else " \n" for i, n in enumerate(notes)]
            )
            expected = [
                shown_by_rule(i, success, notes, own, when, beside, use_solution, use_feedback) for i in range(4)
            ]
            assert seen(context, batch) == expected, (success, notes, own, when, beside)


def test_peers_come_from_the_own_group_only():
    batch = rollouts([0.0, 1.0, 0.0, 0.0, 1.0, 0.0], group=2)
    assert seen(Feedback(**SHORT), batch) == ["q0|S:c1|", None, None, None, None, "q2|S:c4|"]


def test_groups_must_be_whole():
    with pytest.raises(ValueError, match="5 rollouts are no whole groups of 4"):
        seen(Feedback(), rollouts([1.0] * 5))


def test_the_threshold_and_what_float32_makes_of_it():
    float32_of_0_7 = 0.699999988079071
    batch = rollouts([float32_of_0_7, 0.69, None, float("nan")])
    assert seen(Feedback(**SHORT, success_threshold=0.7, exclude_own_success=False), batch) == ["q0|S:c0|"] * 4
    assert seen(Feedback(**SHORT, success_threshold=0.71), batch) == [None] * 4


def test_a_rollout_that_cannot_be_scored_is_no_success_but_has_its_feedback():
    batch = rollouts([None, None, None, None], feedback=["n0", None, "", "n3"])
    assert seen(Feedback(**SHORT), batch) == ["q0||F:n0", None, None, "q0||F:n3"]


def test_without_scores_and_feedback_there_is_no_signal():
    batch = rollouts([1.0] * 4)
    batch.scores = ()
    assert seen(Feedback(), batch) == [None] * 4


# Which peer


def peers(batch, **options) -> list:
    return [source.peer for source in Feedback(**options).sources(batch)]


def test_peer_choices():
    batch = rollouts([1.0, 1.5, 0.0, 1.5], completions=["longest", "long", "x", "four"])
    assert peers(batch, peer="first") == [1, 0, 0, 0]
    assert peers(batch, peer="shortest") == [1, 3, 1, 1]
    assert peers(batch, peer="best") == [1, 3, 1, 1]
    assert peers(batch, peer="best", exclude_own_success=False) == [1, 1, 1, 1]


def test_the_random_peer_is_any_success_and_the_same_on_every_call():
    batches = [rollouts([1.0, 0.0, 1.0, 1.0], prompts=[f"q{n}"] * 4) for n in range(300)]
    context = Feedback(peer="random", seed=1)
    first = [[source.peer for source in context.sources(batch)] for batch in batches]
    again = [[source.peer for source in context.sources(batch)] for batch in reversed(batches)][::-1]
    assert first == again, "the draw depends on earlier draws"
    assert first != [peers(batch, peer="random", seed=2) for batch in batches]
    for row, allowed in enumerate([{2, 3}, {0, 2, 3}, {0, 3}, {0, 2}]):
        counts = Counter(draw[row] for draw in first)
        assert set(counts) == allowed
        # 300 draws: five standard deviations around an even split.
        share = 1 / len(allowed)
        assert all(abs(n - 300 * share) < 5 * (300 * share * (1 - share)) ** 0.5 for n in counts.values())
    shared = Feedback(peer="random", exclude_own_success=False)
    draws = [[source.peer for source in shared.sources(batch)] for batch in batches]
    assert any(len(set(draw)) > 1 for draw in draws), "the rollouts of a group all draw the same peer"


# Thinking


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no thinking", "no thinking"),
        ("    indented()", "    indented()"),
        ("<think>a\nb</think>\n\nyes", "yes"),
        ("x <think>a\n</think>y<think>b</think> z", "x yz"),
        ("opened by the template </think>\nyes", "yes"),
        ("a</think>b</think>c", "c"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("a</think>yes <think>b</think>no", "yes no"),
        ("yes<think>cut off", "yes"),
        ("<think>only</think>", ""),
    ],
)
def test_thinking_is_removed(text, shown):
    assert without_thinking(text, "<think>") == shown
    assert without_thinking(text, None) == text
    other = text.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")
    assert without_thinking(other, "[THINK]") == shown


def test_a_peer_that_only_thought_is_not_shown():
    batch = rollouts([1.0, 1.0, 0.0, 0.0], completions=["<think>a</think> ", "b", "c", "d"])
    assert seen(Feedback(**SHORT), batch) == ["q0|S:b|", None, "q0|S:b|", "q0|S:b|"]
    kept = seen(Feedback(**SHORT, remove_thinking=False), batch)
    assert kept == ["q0|S:b|", *["q0|S:<think>a</think> |"] * 3]


# From the data


def test_demonstrations_are_joined_and_an_empty_one_is_no_signal():
    rows = [["one", "two"], [], ["", " "], "plain", None, ["  three"]]
    batch = rollouts([0.0] * 6, group=1, golden_response=rows)
    texts = [
        None if d is None else f"{i}:{d}" for i, d in enumerate(["one\ntwo", None, None, "plain", None, "  three"])
    ]
    batch.prompts = [str(i) for i in range(6)]
    assert seen(Demonstration(template="{prompt}:{demonstration}"), batch) == texts
    assert seen(Demonstration(template="{demonstration}/{prompt}", separator=" + "), batch)[0] == "one + two/0"


def test_the_answer_may_be_a_number():
    batch = rollouts([0.0] * 3, group=1, answer=[42, None, ""])
    assert seen(Answer(template="{prompt} {answer}"), batch) == ["q0 42", None, None]


def test_the_default_wording():
    batch = rollouts([1.0, 0.0], group=2, feedback=[None, "Too long."], golden_response=[["hi"]] * 2, answer=["yo"] * 2)
    assert seen(NoContext(), batch) == ["q0", "q0"]
    assert seen(Demonstration(), batch)[0] == templates.DEMONSTRATION.format(prompt="q0", demonstration="hi")
    assert seen(Answer(), batch)[1] == templates.ANSWER.format(prompt="q0", answer="yo")
    solution = templates.SOLUTION_BLOCK.format(solution="c0")
    feedback = templates.FEEDBACK_BLOCK.format(feedback="Too long.")
    shown = seen(Feedback(feedback_with_solution=True), batch)
    assert shown == [None, templates.FEEDBACK.format(prompt="q0", solution=solution, feedback=feedback)]


def test_a_missing_column_is_named_with_the_closest_one():
    batch = rollouts([0.0], group=1, golden_response=[["a"]], answer=["b"])
    for check in (lambda c: seen(c, batch), lambda c: c.check(batch.columns)):
        with pytest.raises(
            UserError,
            match=r"teacher\.context\.field=golden: .* it has answer, golden_response; did you mean golden_response\?",
        ):
            check(Demonstration(field="golden"))
    with pytest.raises(UserError, match="beside prompt it has none"):
        Answer().check({})


def test_a_column_without_a_single_text_is_refused_before_training():
    with pytest.raises(UserError, match=r"teacher\.context\.field=golden_response.*empty in every row"):
        Demonstration().check({"golden_response": [[], None, [""]]})
    Demonstration().check({"golden_response": [[], ["a"]]})
    with pytest.raises(UserError, match=r"Name one that holds texts: label\.$"):
        Demonstration().check({"golden_response": [[]], "answer": [None], "label": ["x"], "id": ["1"]})


def test_a_row_without_a_demonstration_shows_its_answer():
    batch = rollouts([0.0] * 3, group=1, golden_response=[["g"], [], None], answer=["a", "b", None])
    Demonstration().check({"golden_response": [[]], "answer": ["b"]})
    shown = seen(Demonstration(), batch)
    assert ["g" in shown[0], "b" in shown[1], shown[2]] == [True, True, None]
    assert seen(Demonstration(field="answer"), batch)[2] is None


def test_contexts_that_need_no_column():
    Feedback().check({})
    NoContext().check({})


# Messages


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "add: 1 + 2"},
]


def test_only_the_last_user_turn_is_replaced():
    batch = rollouts([0.0], group=1, prompts=[CONVERSATION], answer=["3"])
    before = [dict(message) for message in CONVERSATION]
    (prompt,) = seen(Answer(template="{prompt} ({answer})"), batch)
    assert prompt == [*CONVERSATION[:3], {"role": "user", "content": "add: 1 + 2 (3)"}]
    assert before == CONVERSATION, "the student's prompt was changed"


def test_turns_after_the_last_user_turn_stay():
    opened = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "The result is"}]
    (prompt,) = seen(Answer(template="{prompt} {answer}"), rollouts([0.0], group=1, prompts=[opened], answer=["3"]))
    assert prompt == [{"role": "user", "content": "go 3"}, opened[1]]


def test_a_prompt_without_a_user_turn_is_refused():
    batch = rollouts([0.0], group=1, prompts=[CONVERSATION[:1]], answer=["3"])
    with pytest.raises(UserError, match=r"no user turn.*its turns: system"):
        seen(Answer(), batch)


def test_braces_in_data_are_only_braces():
    nasty = "{prompt} {0} {{x}} {solution} }{ \\1"
    batch = rollouts(
        [1.0, 0.0], group=2, completions=[nasty, "b"], feedback=[None, nasty], prompts=[nasty] * 2, answer=[nasty] * 2
    )
    assert seen(Answer(template="{prompt}~{answer}"), batch)[0] == f"{nasty}~{nasty}"
    shown = seen(Feedback(**SHORT, feedback_with_solution=True), batch)
    assert shown[1] == f"{nasty}|S:{nasty}|F:{nasty}"


# Cut by the token budget


def test_only_the_context_is_cut_and_visibly():
    question = "q" * 500
    batch = rollouts([0.0], group=1, prompts=[question], answer=["abcdefghij" * 10])
    (prompt,) = seen(Answer(template="{prompt}>{answer}<now answer", max_tokens=12), batch)
    # The tokenizer is by characters: ten of the text, two of the mark.
    assert prompt == f"{question}>abcdefghij …<now answer"


def test_solution_and_feedback_have_budgets_of_their_own():
    batch = rollouts([1.0, 0.0], group=2, completions=["s" * 50, "b"], feedback=[None, "f" * 50])
    context = Feedback(**SHORT, feedback_with_solution=True, max_solution_tokens=10, max_feedback_tokens=6)
    assert seen(context, batch)[1] == "q0|S:ssssssss …|F:ffff …"
    unlimited = Feedback(**SHORT, feedback_with_solution=True, max_solution_tokens=None, max_feedback_tokens=None)
    assert seen(unlimited, batch)[1] == f"q0|S:{'s' * 50}|F:{'f' * 50}"


# Wrong options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peer": "shortst"}, r"peer=shortst: write one of first, random, shortest, best; did you mean shortest\?"),
        ({"feedback_when": "fail"}, r"feedback_when=fail.*did you mean failed\?"),
        ({"use_solution": False, "use_feedback": False}, "would see nothing"),
        ({"thinking_tag": "think"}, "thinking_tag=think: write the opening tag"),
        ({"thinking_tag": "</think>"}, "thinking_tag=</think>: write the opening tag"),
        ({"max_solution_tokens": 0}, "max_solution_tokens=0: write a number of tokens from 1"),
        ({"max_feedback_tokens": -1}, "max_feedback_tokens=-1"),
        ({"template": "{prompt}{solution}"}, r"context\.template: the template lacks \{feedback\}"),
        ({"solution_block": "no slot"}, r"context\.solution_block: the template lacks \{solution\}"),
        ({"feedback_block": "{feedback}{prompt}"}, r"context\.feedback_block: \{prompt\} is not a slot.*\{feedback\}"),
    ],
)
def test_wrong_options_are_refused_with_what_to_write(options, message):
    with pytest.raises(UserError, match=message):
        Feedback(**options)


def test_a_slot_that_is_switched_off_may_be_left_out():
    batch = rollouts([1.0, 0.0], group=2)
    assert seen(Feedback(template="{prompt}{solution}", solution_block="+{solution}", use_feedback=False), batch) == [
        None,
        "q0+c0",
    ]


# The configuration


@pytest.mark.parametrize(
    ("name", "kind"),
    [("none", NoContext), ("demonstration", Demonstration), ("answer", Answer), ("feedback", Feedback)],
)
def test_the_configuration_says_what_the_class_does_by_default(name, kind):
    shared = {"seed": 0, "distillation": {"success_threshold": 1.0}}
    config = OmegaConf.create({**shared, "context": OmegaConf.load(CONF / "teacher" / "context" / f"{name}.yaml")})
    context = instantiate(config.context)
    assert isinstance(context, kind)
    batch = rollouts(
        [1.0, 1.0, 0.0, 0.0], feedback=[None, None, "n2", None], golden_response=[["g"]] * 4, answer=["a"] * 4
    )
    assert seen(context, batch) == seen(kind(), batch)
    plain = {key: value for key, value in vars(context).items() if isinstance(value, int | float | str | None)}
    assert plain == {key: vars(kind())[key] for key in plain}


def test_a_template_from_the_command_line():
    line = 'teacher.context.template="{prompt}\n\nHint: {answer}"'
    template = OverridesParser.create().parse_override(line).value()
    batch = rollouts([0.0], group=1, answer=["3"])
    assert seen(Answer(template=template), batch) == ["q0\n\nHint: 3"]
