"""Terms that keep another reward honest, and the control that every reward should be compared with."""

import os
import random
from collections.abc import Sequence
from typing import Any

from selfdistill.errors import UserError
from selfdistill.rewards.base import Reward
from selfdistill.statistics import repetition


class RepetitionPenalty(Reward):
    """−(share of the completion's n-grams that repeat an earlier one), in [−1, 0]; 0 for completions shorter than n.

    Args:
        ngram_tokens: n, in tokens. A character vocabulary wants more (8) than one of word pieces (3 or 4).
    """

    def __init__(self, ngram_tokens: int = 4) -> None:
        if ngram_tokens < 1:
            raise UserError(f"reward.ngram_tokens is {ngram_tokens}; write a whole number of at least 1")
        self.ngram_tokens = ngram_tokens

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float]:
        return [-repetition(ids, self.ngram_tokens) for ids in completion_ids]


class LengthFloor(Reward):
    """−max(0, 1 − |y| / min_tokens), in [−1, 0]: completions shorter than the floor lose in proportion.

    Args:
        min_tokens: the floor; a closing EOS counts as a token.
    """

    def __init__(self, min_tokens: int = 4) -> None:
        if min_tokens < 1:
            raise UserError(f"reward.min_tokens is {min_tokens}; write a whole number of at least 1")
        self.min_tokens = min_tokens

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float]:
        return [-max(0.0, 1 - len(ids) / self.min_tokens) for ids in completion_ids]


class RandomReward(Reward):
    """1 with a fixed probability, otherwise 0, whatever the completion says.

    Some models get better at benchmarks under random rewards (arXiv 2506.10947): a gain that this control also shows is
    no merit of the reward. Draws depend on the seed, the training step, the call within it and the process, not on the
    calls before, so a resumed run draws what an unbroken one does.
    """

    def __init__(self, seed: int = 0, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise UserError(f"reward.probability is {probability}; write a number from 0 to 1")
        self.seed = seed
        self.probability = probability
        self._step, self._calls = -1, 0

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], trainer_state: Any = None, **columns: Any
    ) -> list[float]:
        step = int(getattr(trainer_state, "global_step", 0))
        self._calls = self._calls + 1 if step == self._step else 0
        self._step = step
        draw = random.Random(f"{self.seed}/{step}/{self._calls}/{os.environ.get('RANK', '0')}")
        return [float(draw.random() < self.probability) for _ in completions]
