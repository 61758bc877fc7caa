"""Which tokens of a batch are looked at."""

import torch

from selfdistill.training.token_weights import spread_tokens


def test_tokens_are_spread_over_each_row() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0, 0], [0] * 9]).bool()
    chosen = spread_tokens(mask, 4)
    assert chosen[0].nonzero().squeeze(1).tolist() == [1, 3, 5, 7]
    assert chosen[1].sum() == 3 and not chosen[2].any()
    assert torch.equal(spread_tokens(mask[1:2], 4)[0], chosen[1]), "what else is in the batch changes nothing"
