"""What can be said about a run beyond model, data, rewards and teacher: the trainer's own settings."""

from dataclasses import dataclass
from typing import no_type_check

from trl import GRPOConfig

from selfdistill.errors import UserError
from selfdistill.losses import MODES

SIGNALS = ("distribution", "sampled_token", "advantage")
ROUTES = ("all", "failures")

Real = float | int


@dataclass
class Distillation:
    """What is distilled and how it is weighed.

    Args:
        alpha: 0 = KL(teacher || student), 1 = KL(student || teacher), between = generalised Jensen-Shannon.
        top_k: the student's k likeliest tokens instead of the whole vocabulary.
        tail: with `top_k`, the remaining mass is one more outcome; False renormalises.
        signal: `distribution` compares distributions; `sampled_token` uses the sampled tokens' log-probabilities alone
            (alpha must be 1); `advantage` adds log q - log pi of the sampled tokens to the policy gradient's advantages.
        temperature: of both sides; None takes the sampling temperature.
        is_clip: upper bound of the importance weight pi / pi_old; None leaves the weight out.
        skip_tokens: leading completion tokens that carry no loss.
        pointwise_clip: upper bound of each vocabulary entry's contribution (OPSD).
        jsd_normalize: removes the jump of the divergence between alpha -> 0, 1 and alpha = 0, 1.
        aggregation: token_mean, seq_mean_token_mean, seq_mean_token_sum or seq_mean_token_sum_norm (sum over tokens /
            (rows * max_completion_length)); each over all rows of an optimizer step.
        count_inactive_rows: whether rows without a signal count in the denominator, as in the references.
        weight: of this term; 0 leaves it out.
        policy_weight: of the policy gradient; 0 leaves it out.
        route: `all` distils every row with a signal; `failures` distils rows that score below `success_threshold`
            and leaves the others to the policy gradient.

    Raises:
        UserError: a value out of its range.
    """

    alpha: Real = 0.5
    top_k: int | None = None
    tail: bool = True
    signal: str = "distribution"
    temperature: Real | None = None
    is_clip: Real | None = 2.0
    skip_tokens: int = 0
    pointwise_clip: Real | None = None
    jsd_normalize: bool = False
    aggregation: str = "seq_mean_token_mean"
    count_inactive_rows: bool = True
    weight: Real = 1.0
    policy_weight: Real = 0.0
    route: str = "all"
    success_threshold: Real = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(
                f"alpha={self.alpha} is outside [0, 1]: 0 is KL(teacher || student), 1 is KL(student || teacher)."
            )
        for key, choices in (("signal", SIGNALS), ("route", ROUTES), ("aggregation", MODES)):
            if getattr(self, key) not in choices:
                raise UserError(f"distillation.{key}={getattr(self, key)!r}: write one of {', '.join(choices)}.")
        for key in ("temperature", "is_clip", "pointwise_clip"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise UserError(f"distillation.{key}={value} must be above 0; null leaves it out.")
        for key in ("skip_tokens", "weight", "policy_weight"):
            if getattr(self, key) < 0:
                raise UserError(f"distillation.{key}={getattr(self, key)} must be at least 0.")
        if self.signal == "sampled_token" and self.alpha != 1:
            raise UserError(
                "distillation.signal=sampled_token estimates KL(student || teacher) and needs alpha=1, "
                f"not alpha={self.alpha}."
            )
        if self.top_k is not None and (self.top_k < 1 or (self.top_k == 1 and not self.tail)):
            raise UserError(
                f"distillation.top_k={self.top_k} must be at least 1, and at least 2 with distillation.tail=false."
            )


@dataclass
class RolloutSource:
    """Where completions come from.

    Args:
        on_policy_fraction: share of prompts that the student answers; the others take their demonstration (GKD's
            lambda; 0 is plain fine-tuning on demonstrations).
        from_teacher: sample from the teacher, with its context, instead of the student; rows for which the teacher is
            shown nothing are sampled from the student's own prompt.
        demonstration_field: the column that holds demonstrations: a text or a list, of which the first counts.
        cross_entropy_weight: weight of the cross-entropy on rows whose completion is a demonstration.

    Raises:
        UserError: a value out of its range.
    """

    on_policy_fraction: Real = 1.0
    from_teacher: bool = False
    demonstration_field: str = "golden_response"
    cross_entropy_weight: Real = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy_fraction <= 1:
            raise UserError(f"rollout.on_policy_fraction={self.on_policy_fraction} is outside [0, 1].")
        if self.cross_entropy_weight < 0:
            raise UserError(f"rollout.cross_entropy_weight={self.cross_entropy_weight} must be at least 0.")


@no_type_check  # TRL stores other types than it annotates; the tests check annotations at run time
class SelfDistillConfig(GRPOConfig):
    """TRL's arguments; `num_generations=1` is allowed, for runs without a policy gradient."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            # raised after everything that a run with one generation needs has been set up
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
