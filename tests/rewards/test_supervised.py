import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdistill.errors import UserError
from selfdistill.rewards import PolicyScorer, Supervised
from tests.reference import golden
from tests.rewards.fakes import EOS, CharTokenizer, ReciteModel, TableModel, ids

CORRECTED = ["divide", "pad", "additive", "prob"]
MODES = ["completion_cross_entropy", "answer_perplexity"]


def supervised(model, **arguments) -> Supervised:
    reward = Supervised(**arguments)
    reward.bind(PolicyScorer(model, CharTokenizer()))
    return reward


def score(reward, prompt: str, completions: list[str], answer: str | None, **more) -> list[float | None]:
    count = len(completions)
    return reward(prompts=[prompt] * count, completions=completions, answer=[answer] * count, **more)


def test_seed_form_equals_the_reference():
    cases, arrays = golden("seed_rewards")
    case = cases["completion_cross_entropy"]
    table = torch.tensor(arrays["completion_cross_entropy/in_table"])
    with pytest.warns(UserWarning, match="PAID"):
        reward = supervised(TableModel(table), coverage="seed")
    found = score(reward, "ignored", case["completions"], case["answer"])
    expected = [None if math.isnan(value) else value for value in arrays["completion_cross_entropy/out"]]
    assert [value is None for value in found] == [value is None for value in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None]
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=2e-5)


def test_seed_form_of_answer_perplexity():
    table = torch.randn(28, 28, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="PAID"):
        reward = supervised(TableModel(table), coverage="seed", mode="answer_perplexity")
    logprobs = table.log_softmax(-1)
    path = ids("qanswer")
    perplexity = math.exp(-sum(float(logprobs[a, b]) for a, b in pairwise(path)) / 6)
    found = score(reward, "q", ["ans", "answer", "answer and more"], "answer")
    assert found == pytest.approx([-perplexity / 2, -perplexity, -perplexity], rel=1e-5)


@given(
    nats=st.floats(0.01, 12),
    wanted=st.integers(1, 30),
    mode=st.sampled_from(MODES),
    coverage=st.sampled_from(CORRECTED),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_cutting_a_completion_short_never_pays(nats, wanted, mode, coverage, data):
    """Equal cross-entropy at every token: the shorter completion earns less; equally little only where `pad` has
    nothing to add, because a uniform guess would be better than what was written."""
    longer = data.draw(st.integers(1, wanted))
    shorter = data.draw(st.integers(1, longer))
    reward = supervised(TableModel(torch.zeros(28, 28)), mode=mode, coverage=coverage)

    def value(length: int) -> float:
        scored = wanted if mode == "answer_perplexity" else length
        return reward._combine([nats] * scored, length, wanted)

    if shorter == longer:
        assert value(shorter) == value(longer)
    elif coverage == "pad" and nats >= math.log(28):
        assert value(shorter) <= value(longer) + 1e-9 * abs(value(longer))
    else:
        assert value(shorter) < value(longer)


@pytest.mark.parametrize("coverage", CORRECTED)
@pytest.mark.parametrize("mode", MODES)
def test_cutting_short_never_pays_through_the_model(coverage, mode):
    # Every token costs the same under this table, whatever stands before it.
    table = torch.full((28, 28), 0.0)
    found = score(
        supervised(TableModel(table), coverage=coverage, mode=mode), "q", ["a", "ab", "abcd", "abcde"], "abcde"
    )
    assert all(a < b + 1e-9 for a, b in pairwise(found))
    assert found[0] < found[-1] or coverage == "pad"  # ln V is what each token costs anyway


def test_the_table_of_the_published_formula_and_its_corrections():
    """CE = 2 at every length, |a| = 10, V = 151936: what each form says, and the order that it gives."""
    scorer = PolicyScorer(TableModel(torch.zeros(2, 2)), CharTokenizer())
    expected = {
        "divide": {1: -20.0, 2: -10.0, 5: -4.0, 10: -2.0, 20: -2.0},
        "pad": {1: -10.938, 2: -9.945, 5: -6.966, 10: -2.0, 20: -2.0},
        "prob": {1: 0.01353, 2: 0.02707, 5: 0.06767, 10: 0.13534, 20: 0.13534},
        "additive": {1: -2.9, 2: -2.8, 5: -2.5, 10: -2.0, 20: -2.0},
    }
    for coverage, values in expected.items():
        reward = Supervised(coverage=coverage, missing_nats=math.log(151936))
        reward.bind(scorer)
        for length, value in values.items():
            assert reward._combine([2.0] * min(length, 10), length, 10) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("include_eos", [False, True])
@pytest.mark.parametrize("coverage", CORRECTED)
def test_the_exact_answer_scores_best(coverage, include_eos):
    prompt, answer = "say ", "the cat"
    model = ReciteModel(ids(prompt), ids(answer), confidence=0.9)
    reward = supervised(model, coverage=coverage, include_eos=include_eos, overlong_weight=0.5)
    others = ["t", "th", "the ca", "the catt", "the cat sat", "tha cat", "zzzzzzz", "xhe cat", "cat the"]
    written = [[*ids(text), EOS] for text in [answer, *others]]
    found = score(reward, prompt, [answer, *others], answer, completion_ids=written)
    assert all(found[0] > other for other in found[1:])


def test_without_eos_a_one_token_answer_says_nothing_about_the_completion_and_with_it_does():
    model = ReciteModel(ids("say "), ids("x"), confidence=0.9)
    written = [[*ids("x"), EOS], [*ids("y"), EOS]]
    without = score(supervised(model), "say ", ["x", "y"], "x", completion_ids=written)
    assert without[0] == without[1]
    right, wrong = score(supervised(model, include_eos=True), "say ", ["x", "y"], "x", completion_ids=written)
    assert right > wrong


def test_own_logprobs_spare_the_pass_where_the_completion_is_the_answer_so_far():
    model = TableModel(torch.randn(28, 28, generator=torch.Generator().manual_seed(1)))
    reward = supervised(model)
    texts = ["cat", "ca", "cats", "dog"]
    by_pass = score(reward, "q", texts, "cat")
    assert model.calls == 1
    written = [ids(text) for text in texts]
    own = reward.scorer.token_logprobs([ids("q")] * 4, written)
    model.calls = 0
    assert score(reward, "q", texts[:3], "cat", policy_logprobs=own[:3]) == pytest.approx(by_pass[:3], rel=1e-6)
    assert model.calls == 0
    assert score(reward, "q", texts, "cat", policy_logprobs=own) == pytest.approx(by_pass, rel=1e-6)
    assert model.calls == 1


def test_a_group_shares_the_question_of_answer_perplexity():
    seen = []

    class Counting(TableModel):
        def forward(self, input_ids):
            seen.append(input_ids.shape[0])
            return super().forward(input_ids)

    reward = supervised(Counting(torch.zeros(28, 28)), mode="answer_perplexity")
    score(reward, "q", ["a", "ab", "abc", "abcd"], "abcd")
    assert seen == [1]


def test_rows_without_completion_or_answer_are_not_scorable():
    reward = supervised(TableModel(torch.zeros(28, 28)))
    found = reward(
        prompts=["q"] * 5,
        completions=["", "a", "a", "a", ""],
        completion_ids=[[], ids("a"), ids("a"), ids("a"), [EOS]],
        answer=["a", "", None, None, "a"],
        golden_response=[["a"], ["a"], ["a", "b"], [], ["a"]],
    )
    assert [value is None for value in found] == [True, True, False, True, True]


def test_overlong_completions_lose_only_where_asked():
    model = TableModel(torch.zeros(28, 28))
    plain = score(supervised(model), "q", ["ab", "abababab"], "ab")
    assert plain[0] == plain[1]
    fined = score(supervised(model, overlong_weight=0.1, overlong_ratio=2.0), "q", ["ab", "abababab"], "ab")
    assert fined == pytest.approx([plain[0], plain[1] - 0.2])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"mode": "ce"}, "reward.mode"),
        ({"coverage": "times"}, "reward.coverage"),
        ({"coverage_weight": -1.0}, "reward.coverage_weight"),
        ({"overlong_weight": -0.1}, "reward.overlong_weight"),
    ],
)
def test_wrong_settings_name_the_key(arguments, key):
    with pytest.raises(UserError, match=key):
        Supervised(**arguments)


def test_a_missing_column_is_named():
    reward = supervised(TableModel(torch.zeros(28, 28)), answer_field="solution")
    with pytest.raises(UserError, match=r"solution.*answer.*reward.answer_field"):
        score(reward, "q", ["a"], "a")


def test_seed_form_knows_no_eos():
    with pytest.warns(UserWarning, match="PAID"):
        plain = supervised(TableModel(torch.zeros(28, 28)), coverage="seed")
    with pytest.warns(UserWarning, match="PAID"):
        asked = supervised(TableModel(torch.zeros(28, 28)), coverage="seed", include_eos=True)
    written = [[*ids("ab"), EOS], ids("ab")]
    for answer in ("a", "abc"):
        call = {"completions": ["ab", "ab"], "answer": answer, "completion_ids": written}
        assert score(asked, "q", **call) == score(plain, "q", **call)
        assert len(set(score(plain, "q", **call))) == 1
