"""Rows of different lengths and widths become one."""

import torch

from selfdistill.losses import TopTokens


def top_tokens(sampled: list[float], ids: list[list[int]], logps: list[list[float]]) -> TopTokens:
    return TopTokens(torch.tensor(sampled), torch.tensor(ids), torch.tensor(logps))


def test_kept_positions_follow_each_other_and_narrow_rows_are_padded_with_impossible_tokens() -> None:
    wide = top_tokens([-1.0, -2.0], [[4, 5, 6], [7, 8, 9]], [[-0.5, -1.0, -3.0], [-0.6, -2.0, -4.0]])
    narrow = top_tokens([-3.0, -4.0], [[1], [2]], [[-0.1], [-0.2]])
    # The second mask is longer than its row, and says of the padding that it is kept.
    keep = [torch.tensor([False, True]), torch.tensor([True, True, True]), torch.tensor([True])]
    together = TopTokens.concatenated([wide, narrow, TopTokens.empty(2)], keep)
    assert together.sampled_logps.tolist() == [-2.0, -3.0, -4.0]
    assert together.ids.tolist() == [[7, 8, 9], [1, 0, 0], [2, 0, 0]]
    inf = float("inf")
    wanted = torch.tensor([[-0.6, -2.0, -4.0], [-0.1, -inf, -inf], [-0.2, -inf, -inf]])
    torch.testing.assert_close(together.logps, wanted, rtol=0, atol=0)


def test_no_rows_at_all_give_no_positions() -> None:
    nothing = TopTokens.concatenated([], [])
    assert (nothing.sampled_logps.shape, nothing.ids.shape, nothing.logps.shape) == ((0,), (0, 1), (0, 1))
    assert nothing.ids.dtype == torch.long
