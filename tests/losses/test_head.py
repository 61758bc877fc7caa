"""The entropy that is logged where no policy gradient computes one."""

import pytest
import torch

from selfdistill.losses.head import ENTROPY_TOKENS, Head, sampled_entropy


def mean(found: tuple[float, int]) -> float:
    return found[0] / found[1]


def entropy(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> float:
    logp = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    return -(logp.exp() * logp).sum(-1).mean().item()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, ENTROPY_TOKENS])
def test_a_small_batch_is_taken_whole(tokens: int) -> None:
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 8), torch.randn(50, 8)
    found = mean(sampled_entropy(hidden, Head(weight, temperature=0.7)))
    assert found == pytest.approx(entropy(hidden, weight, 0.7), rel=1e-5)


def test_a_large_batch_is_sampled_from_its_beginning_to_its_end() -> None:
    torch.manual_seed(0)
    sharp, flat = torch.full((200, 8), 9.0), torch.zeros(200, 8)
    weight = torch.randn(50, 8)
    both = torch.cat([flat, sharp])
    found = mean(sampled_entropy(both, Head(weight)))
    assert found == pytest.approx(entropy(both, weight, 1.0), rel=0.02)


def test_a_token_of_no_probability_adds_nothing() -> None:
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [0.0], [-torch.inf]])
    assert mean(sampled_entropy(hidden, Head(weight))) == pytest.approx(0.693147, rel=1e-5)
