import math

import pytest
import torch

from selfdistill.errors import UserError
from selfdistill.rewards import AnswerLikelihood, PolicyScorer
from tests.rewards.fakes import EOS, LETTERS, CharTokenizer, TableModel, ids


class Model(TableModel):
    """Surer of "ok" behind "z" than behind anything else; counts the rows that it is shown."""

    def __init__(self) -> None:
        table = torch.zeros(28, 28)
        table[LETTERS.index("z"), LETTERS.index("o")] = 3.0
        table[LETTERS.index("o"), LETTERS.index("k")] = 2.0
        super().__init__(table)
        self.rows = 0

    def forward(self, input_ids):
        self.rows += input_ids.shape[0]
        return super().forward(input_ids)


def probability(first: str, second: str) -> float:
    table = Model().table.detach().softmax(-1)
    return float(table[LETTERS.index(first), LETTERS.index(second)])


def reward(**arguments) -> AnswerLikelihood:
    built = AnswerLikelihood(**arguments)
    built.bind(PolicyScorer(Model(), CharTokenizer()))
    return built


def call(built, completions, answer="ok", **more):
    count = len(completions)
    return built(prompts=["q"] * count, completions=completions, answer=[answer] * count, **more)


def test_each_reduction_is_its_definition():
    o, k = probability("z", "o"), probability("o", "k")
    expected = {"mean_prob": (o + k) / 2, "prod": o * k, "geo_mean": math.sqrt(o * k), "mean_logp": math.log(o * k) / 2}
    for reduce, value in expected.items():
        assert call(reward(delimiter=None, reduce=reduce, debias=False), ["az"]) == pytest.approx([value], rel=1e-5)


def test_debiasing_subtracts_the_probability_without_reasoning_and_clips():
    with_z, without, k = probability("z", "o"), probability("q", "o"), probability("o", "k")
    found = call(reward(delimiter=None), ["az", "zb"])
    assert found == pytest.approx([(with_z + k) / 2 - (without + k) / 2, 0.0], rel=1e-5, abs=1e-7)
    worse = reward(delimiter=None)
    assert worse(prompts=["z"], completions=["b"], answer=["ok"]) == [0.0]
    unclipped = reward(delimiter=None, reduce="mean_logp")
    assert unclipped(prompts=["z"], completions=["b"], answer=["ok"])[0] < 0


def test_the_answer_of_the_completion_is_dropped_and_the_delimiter_kept():
    built = reward(delimiter="wz")
    found = call(built, ["aa wzok", "aa wznonsense", "aa wz"])
    assert found[0] == pytest.approx(found[1]) == pytest.approx(found[2])
    assert built._reasoning(ids("aa wzok")) == ids("aa wz")
    assert built._reasoning(ids("wz wzok")) == ids("wz")
    assert built._reasoning(ids("nothing")) is None


def test_a_delimiter_that_shares_a_token_with_the_answer_is_cut_off_it():
    class Pairs(CharTokenizer):
        """Ids from 100 on stand for two letters."""

        def decode(self, token_ids):
            return "".join({100: "za", 101: "z "}.get(token) or LETTERS[token] for token in token_ids)

    built = AnswerLikelihood(delimiter="wz")
    built.bind(PolicyScorer(Model(), Pairs()))
    assert built._reasoning([*ids("aw"), 100, *ids("b")]) == ids("awz")
    assert built._reasoning([*ids("aw"), 101, *ids("b")]) == [*ids("aw"), 101]  # white space alone is kept as sampled


def test_completions_without_the_delimiter():
    whole = call(reward(delimiter="wz"), ["aaa"])
    assert whole == pytest.approx(call(reward(delimiter="wz"), ["aaawzno"]))
    assert call(reward(delimiter="wz", missing_delimiter="zero"), ["aaa", "aaawz"])[0] == 0.0


def test_a_group_shares_its_baseline():
    built = reward(delimiter=None)
    call(built, ["az", "bz", "cz", "dz"])
    assert built.scorer.model.rows == 5


def test_rows_that_cannot_be_scored():
    found = reward(delimiter=None)(
        prompts=["q"] * 4,
        completions=["", "a", "a", "a"],
        completion_ids=[[EOS], ids("a"), ids("a"), ids("a")],
        answer=["ok", "", None, None],
        golden_response=[["ok"], ["ok"], [], ["ok"]],
    )
    assert [value is None for value in found] == [True, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"reduce": "sum"}, "reward.reduce"),
        ({"missing_delimiter": "none"}, "reward.missing_delimiter"),
        ({"missing_delimiter": "zero", "delimiter": None}, "reward.missing_delimiter=zero"),
    ],
)
def test_wrong_settings_name_the_key(arguments, key):
    with pytest.raises(UserError, match=key):
        AnswerLikelihood(**arguments)
