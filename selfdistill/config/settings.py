"""The trainer's own settings, beside model, data, rewards and teacher: for the command line and for Python."""

from dataclasses import dataclass, field

from selfdistill.errors import UserError
from selfdistill.limits import check_limits, number, one_of
from selfdistill.losses.divergence import Divergence


@dataclass(frozen=True)
class Distillation(Divergence):
    """What is distilled and how it is weighed: a divergence, and the keys here.

    The defaults are those of conf/train.yaml, but for `policy_weight`. In Python a teacher replaces the policy gradient
    unless `policy_weight` asks for it. On the command line a run without a teacher has the policy gradient, and a
    teacher that is added to its reward joins it.

    Args:
        alpha, top_k, tail, temperature, pointwise_clip, jsd_normalize: see `Divergence`; where the temperature is None,
            the sampling temperature is taken.
        signal: `distribution` compares distributions; `sampled_token` uses the sampled tokens' log-probabilities alone
            (alpha must be 1); `advantage` adds log q - log pi of the sampled tokens to the advantages of the policy
            gradient.
        is_clip: upper bound of the importance weight pi / pi_old; None leaves the weight out.
        skip_tokens: leading completion tokens that carry no loss.
        aggregation: token_mean, seq_mean_token_mean, seq_mean_token_sum or seq_mean_token_sum_norm (sum over tokens /
            (rows * max_completion_length)); each over all rows of an optimizer step.
        count_inactive_rows: whether rows without a signal count in the denominator, as in the references.
        weight: weight of the distillation in the loss; 0 leaves it out.
        policy_weight: weight of the policy gradient in the loss; 0 leaves it out.
        route: `all` distils every row with a signal; `failures` distils rows that score below `success_threshold`
            and leaves the others to the policy gradient.
        success_threshold: the score from which a rollout is a success.

    Raises:
        UserError: a value out of its range, or two values that contradict each other.
    """

    signal: str = field(default="distribution", metadata=one_of("distribution", "sampled_token", "advantage"))
    is_clip: float | None = field(default=2.0, metadata=number(above=0))
    skip_tokens: int = field(default=0, metadata=number(0))
    aggregation: str = field(
        default="seq_mean_token_mean",
        metadata=one_of("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"),
    )
    count_inactive_rows: bool = True
    weight: float = field(default=1.0, metadata=number(0))
    policy_weight: float = field(default=0.0, metadata=number(0))
    route: str = field(default="all", metadata=one_of("all", "failures"))
    success_threshold: float = field(default=1.0, metadata=number())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signal == "sampled_token" and self.alpha != 1:
            raise UserError(
                "distillation.signal=sampled_token estimates KL(student || teacher) and needs alpha=1: "
                f"write alpha=1, not alpha={self.alpha}."
            )

    def written(self, name: str) -> str:
        return f"distillation.{name}={getattr(self, name)}"


@dataclass(frozen=True)
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

    on_policy_fraction: float = field(default=1.0, metadata=number(0, 1))
    from_teacher: bool = False
    demonstration_field: str = "golden_response"
    cross_entropy_weight: float = field(default=0.0, metadata=number(0))

    def __post_init__(self) -> None:
        check_limits(type(self), vars(self), lambda name: f"rollout.{name}={getattr(self, name)}")
