"""The policy's own confidence as the reward: nothing but prompts is needed.

All three drive the policy's entropy down, and all three are known to end in overconfidence or repetition when pushed
(arXiv 2506.17219; Intuitor's repository, thread 23): keep a KL penalty, watch the monitors, see `penalties.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.rewards.base import PolicyReward, check_choice
from selfdistill.rewards.batching import Ids
from selfdistill.rewards.scorer import to_lists


@dataclass(eq=False)
class _Confidence(PolicyReward):
    """The mean over the completion's tokens of a value in nats, which is higher where the policy is surer.

    Args:
        score_eos: whether the closing EOS counts as a token of the completion.
        truncated: `keep` scores completions that hit the length limit like any other, `exclude` gives them None.

    A completion without a token besides EOS is not scorable (None): there is nothing to take the mean of, and 0 would
    be the highest reward there is.
    """

    score_eos: bool = True
    truncated: str = "keep"

    def __post_init__(self) -> None:
        check_choice("truncated", self.truncated, ("keep", "exclude"))

    def _scores(
        self, prompt_ids: Ids, completion_ids: Ids, logprobs: Sequence[Tensor] | None, columns: Mapping[str, Any]
    ) -> list[float | None]:
        values = to_lists(self._values(prompt_ids, completion_ids, logprobs))
        return [self._mean(ids, row) for ids, row in zip(completion_ids, values, strict=True)]

    def _mean(self, ids: Sequence[int], values: list[float]) -> float | None:
        content = self.scorer.without_eos(ids)
        ended = len(content) < len(ids)
        if not content or (self.truncated == "exclude" and not ended):
            return None
        kept = values if self.score_eos else values[: len(content)]
        return math.fsum(self._token(value) for value in kept) / len(kept)

    def _token(self, value: float) -> float:
        return value

    def _values(self, prompt_ids: Ids, completion_ids: Ids, logprobs: Sequence[Tensor] | None) -> Sequence[Tensor]:
        raise NotImplementedError


@dataclass(eq=False)
class InverseLoss(_Confidence):
    """r = (1/|y|) Σ_t log π(y_t | x, y_<t): minus the loss on the completion's own tokens.

    Its expectation is minus the policy's entropy. With `policy_logprobs` in the call no forward pass is made.

    Args:
        score_eos: whether the closing EOS counts as a token of the completion.
        truncated: `keep` scores completions that hit the length limit like any other, `exclude` gives them None.
        clip_logp: tokens surer than this (a log-probability, at most 0) count as this, so that a near-deterministic
            repetition earns nothing more; log 0.95 = −0.0513 is a usual choice.
    """

    clip_logp: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_logp is not None and self.clip_logp > 0:
            raise UserError(
                f"reward.clip_logp is {self.clip_logp}; it is a log-probability: write a number of at most 0"
            )

    def _token(self, value: float) -> float:
        return value if self.clip_logp is None else min(value, self.clip_logp)

    def _values(self, prompt_ids: Ids, completion_ids: Ids, logprobs: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return self.scorer.token_logprobs(prompt_ids, completion_ids) if logprobs is None else logprobs


class SelfCertainty(_Confidence):
    """r = (1/|y|) Σ_t [logsumexp(z_t) − mean(z_t)], KL(uniform ‖ p_t) + ln V (Intuitor, arXiv 2505.19590).

    z_t are the logits that predict token t.
    """

    def _values(self, prompt_ids: Ids, completion_ids: Ids, logprobs: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return self.scorer.token_statistics(prompt_ids, completion_ids).self_certainty


class Entropy(_Confidence):
    """r = −(1/|y|) Σ_t H(p_t): minus the entropy of the distribution behind each token (RENT, arXiv 2505.22660)."""

    def _values(self, prompt_ids: Ids, completion_ids: Ids, logprobs: Sequence[Tensor] | None) -> Sequence[Tensor]:
        return [-row for row in self.scorer.token_statistics(prompt_ids, completion_ids).entropy]
