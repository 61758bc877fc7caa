"""The entropy that is logged where no policy gradient computes one."""

import pytest
import torch

from selfdistill.losses.head import ENTROPY_CHUNK_TOKENS, Head, entropy_sum


@pytest.mark.parametrize("tokens", [1, ENTROPY_CHUNK_TOKENS - 1, ENTROPY_CHUNK_TOKENS, ENTROPY_CHUNK_TOKENS + 1, 64])
def test_the_sum_over_chunks_is_that_of_all(tokens: int) -> None:
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 8), torch.randn(50, 8)
    logp = torch.log_softmax(hidden @ weight.T / 0.7, dim=-1)
    expected = -(logp.exp() * logp).sum().item()
    assert entropy_sum(hidden, Head(weight, temperature=0.7)) == pytest.approx(expected, rel=1e-5)


def test_a_token_of_no_probability_adds_nothing() -> None:
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [0.0], [-torch.inf]])
    assert entropy_sum(hidden, Head(weight)) == pytest.approx(3 * 0.693147, rel=1e-5)
