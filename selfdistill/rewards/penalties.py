"""Terms that keep another reward honest, and the control that every reward should be compared with."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerState

from selfdistill.errors import UserError
from selfdistill.rewards.base import Reward
from selfdistill.rewards.batching import Ids
from selfdistill.statistics import repetition


@dataclass(eq=False)
class RepetitionPenalty(Reward):
    """−(share of the completion's n-grams that repeat an earlier one), in [−1, 0]; 0 for completions shorter than n.

    Args:
        ngram_tokens: n, in tokens. A character vocabulary wants more (8) than one of word pieces (3 or 4).
    """

    ngram_tokens: int = 4

    def __post_init__(self) -> None:
        if self.ngram_tokens < 1:
            raise UserError(f"reward.ngram_tokens is {self.ngram_tokens}; write a whole number of at least 1")

    def __call__(self, completion_ids: Ids, **columns: Any) -> list[float]:
        return [-repetition(ids, self.ngram_tokens) for ids in completion_ids]


@dataclass(eq=False)
class LengthFloor(Reward):
    """−max(0, 1 − |y| / min_tokens), in [−1, 0]: completions shorter than the floor lose in proportion.

    Args:
        min_tokens: the floor; a closing EOS counts as a token.
    """

    min_tokens: int = 4

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise UserError(f"reward.min_tokens is {self.min_tokens}; write a whole number of at least 1")

    def __call__(self, completion_ids: Ids, **columns: Any) -> list[float]:
        return [-max(0.0, 1 - len(ids) / self.min_tokens) for ids in completion_ids]


@dataclass(eq=False)
class RandomReward(Reward):
    """1 with a fixed probability, otherwise 0, whatever the completion says.

    Some models get better at benchmarks under random rewards (arXiv 2506.10947): a gain that this control also shows is
    not due to the reward. A draw depends on the seed, the training step, the process and how many calls the step had
    before it, but not on earlier steps: a resumed run draws what an unbroken one does.
    """

    seed: int = 0
    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UserError(f"reward.probability is {self.probability}; write a number from 0 to 1")
        self._step, self._calls = -1, 0

    def __call__(
        self, completions: Sequence[Any], trainer_state: TrainerState | None = None, **columns: Any
    ) -> list[float]:
        step = 0 if trainer_state is None else trainer_state.global_step
        self._calls = self._calls + 1 if step == self._step else 0
        self._step = step
        draw = random.Random(f"{self.seed}/{step}/{self._calls}/{os.environ.get('RANK', '0')}")
        return [float(draw.random() < self.probability) for _ in completions]
