import math

import numpy as np
import pytest
import torch

from selfdistill.errors import UserError
from selfdistill.rewards import Entropy, InverseLoss, PolicyScorer, SelfCertainty
from tests.reference import golden
from tests.rewards.fakes import EOS, CharTokenizer, TableModel, ids
from tests.tiny import tiny_model, tiny_tokenizer


def bound(reward, model=None, tokenizer=None):
    reward.bind(PolicyScorer(model or tiny_model(), tokenizer or tiny_tokenizer()))
    return reward


def test_inverse_loss_equals_the_reference_on_every_completion_with_a_token():
    cases, arrays = golden("seed_rewards")
    case = cases["inverse_loss"]
    table = torch.tensor(arrays["inverse_loss/in_table"])
    reward = bound(InverseLoss(), TableModel(table), CharTokenizer())
    found = reward(prompts=case["prompts"], completions=case["completions"])
    for text, ours, theirs in zip(case["completions"], found, arrays["inverse_loss/out"], strict=True):
        if text:
            np.testing.assert_allclose(ours, theirs, rtol=2e-5)
        else:  # there 0, the highest reward of all: here not scorable
            assert theirs == 0
            assert ours is None


def test_own_logprobs_are_used_without_a_forward_pass():
    model = TableModel(torch.zeros(28, 28))
    reward = bound(InverseLoss(), model, CharTokenizer())
    logprobs = [torch.tensor([-1.0, -3.0]), torch.tensor([-0.5])]
    found = reward(
        prompts=["a", "b"],
        completions=["xy", "z"],
        prompt_ids=[[0], [1]],
        completion_ids=[ids("xy"), ids("z")],
        policy_logprobs=logprobs,
    )
    assert found == [-2.0, -0.5]
    assert model.calls == 0
    with pytest.raises(ValueError, match="policy_logprobs"):
        reward(prompts=["a"], completions=["xy"], completion_ids=[ids("xy")], policy_logprobs=[torch.tensor([-1.0])])


def test_eos_truncation_clipping_and_empty_completions():
    call = {
        "prompts": ["a"] * 4,
        "completions": ["xy", "xy", "", ""],
        "prompt_ids": [[0]] * 4,
        "completion_ids": [[*ids("xy"), EOS], ids("xy"), [EOS], []],
        "policy_logprobs": [torch.tensor(v) for v in ([-1.0, -2.0, -6.0], [-1.0, -2.0], [-0.1], [])],
    }
    model = TableModel(torch.zeros(28, 28))
    assert bound(InverseLoss(), model, CharTokenizer())(**call) == [-3.0, -1.5, None, None]
    assert bound(InverseLoss(score_eos=False), model, CharTokenizer())(**call) == [-1.5, -1.5, None, None]
    assert bound(InverseLoss(truncated="exclude"), model, CharTokenizer())(**call) == [-3.0, None, None, None]
    assert bound(InverseLoss(clip_logp=-1.5), model, CharTokenizer())(**call)[1] == -1.75


@pytest.mark.parametrize("kind", [InverseLoss, SelfCertainty, Entropy])
def test_a_surer_policy_earns_more(kind):
    logits = torch.randn(28, 28, generator=torch.Generator().manual_seed(0))
    likely = [int(row.argmax()) for row in logits]
    completion = [likely[0]]
    for _ in range(4):
        completion.append(likely[completion[-1]])
    completion = [token % EOS for token in completion]
    scores = []
    for sharpness in (0.5, 1.0, 2.0):
        reward = bound(kind(), TableModel(logits * sharpness), CharTokenizer())
        scores += reward(prompts=["a"], completions=[""], prompt_ids=[[0]], completion_ids=[completion])
    assert scores[0] < scores[1] < scores[2]


def test_uniform_policy():
    model = TableModel(torch.zeros(28, 28))
    call = {"prompts": ["a"], "completions": ["bc"], "prompt_ids": [[0]], "completion_ids": [ids("bc")]}
    assert bound(InverseLoss(), model, CharTokenizer())(**call) == pytest.approx([-math.log(28)], rel=1e-6)
    assert bound(Entropy(), model, CharTokenizer())(**call) == pytest.approx([-math.log(28)], rel=1e-6)
    assert bound(SelfCertainty(), model, CharTokenizer())(**call) == pytest.approx([math.log(28)], rel=1e-6)


def test_training_mode_and_weights_stay_as_they_were():
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids_ = tiny_tokenizer()("abc").input_ids
    bound(InverseLoss(), model)(prompts=["q"], completions=["abc"], prompt_ids=[ids_], completion_ids=[ids_])
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wrong_settings_and_an_unbound_reward():
    with pytest.raises(UserError, match=r"reward.truncated"):
        InverseLoss(truncated="drop")
    with pytest.raises(UserError, match=r"reward.clip_logp"):
        InverseLoss(clip_logp=0.5)
    with pytest.raises(ValueError, match="bind"):
        Entropy()(prompts=["a"], completions=["b"])
    assert InverseLoss().__name__ == "inverse_loss"
