"""Alarms for runs that collapse, and for runs that learn from nothing.

Rewards taken from the policy itself (likelihood, certainty) can be driven up by repetition, and entropy falls as they
rise: He et al. 2025, arXiv 2506.17219; Shafayat et al. 2025, arXiv 2505.21444. A run whose rewards do not differ within
a group, and whose teacher has nothing to say, shows a loss that looks normal and learns nothing.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Any

from selfdistill.config.values import mismatch
from selfdistill.errors import UserError

ACTIONS = ("warn", "stop", "off")

# Standard name of a metric <- the name under which TRL logs it, which is logged no more.
TRL_NAMES = {
    "monitor/entropy": "entropy",
    "monitor/length_tokens": "completions/mean_length",
    "monitor/truncated": "completions/clipped_ratio",
    "monitor/grad_norm": "grad_norm",
    "monitor/sampler_gap": "sampling/sampling_logp_difference/mean",
    "time/step_s": "step_time",
}

# The metric that a monitor watches, where it is not `monitor/` and the monitor's name.
METRIC_OF = {"length": "monitor/length_tokens", "length_growth": "monitor/length_tokens"}

# Under so much at its ends a completion's divergence is small, however it compares with the mean.
JUDGED_DIVERGENCE_NATS = 0.5

_HINTS = {
    "entropy": "the policy is nearly deterministic; raise beta or the temperature, or lower the learning rate",
    "repetition": "completions repeat themselves; raise beta, lower the learning rate, or stop earlier",
    "distinct_2": "completions hardly differ from each other; raise beta or the temperature",
    "length": "completions have become very short or very long; check what the reward pays for",
    "length_growth": "answers grow, as they do where the teacher ends or thinks otherwise than the student; look at "
    "distill/divergence_last and prompts.md, set teacher.chat_template_kwargs or data.chat_template so that both speak "
    "alike, and check whether the reward pays for length",
    "truncated": "answers do not end within the limit, so that nothing teaches them to end; raise "
    "rollout.max_completion_tokens, or compare how student and teacher end (distill/divergence_last, prompts.md)",
    "divergence_ends": "student and teacher differ in how an answer begins or ends rather than in what it says; "
    "compare their prompts in prompts.md, and set teacher.chat_template_kwargs, data.chat_template or, for the first "
    "tokens, distillation.skip_tokens",
    "reward_spread": "completions of one prompt all get the same reward, so the policy gradient is zero; "
    "the prompts are too easy or too hard, or the reward is constant",
    "grad_norm": "the update is unstable; lower the learning rate or max_grad_norm",
    "unscored": "the reward returns None for nearly every completion; does the data have the column that it reads?",
    "update_ratio": "the weights hardly move; raise learning_rate (adapters want about ten times the rate of full "
    "training)",
    "updated_fraction": "most steps are too small for the weights' precision and are rounded away; "
    "write model.dtype=float32, or raise learning_rate",
    "sampler_gap": "the sampler's log-probabilities differ from the trainer's; its weights or its precision differ",
    "no_signal": "nothing is learnt; check the reward on a few completions and what the teacher sees (prompts.md)",
}


@dataclass(frozen=True)
class Threshold:
    """When a monitored value is alarming.

    Attributes:
        below: alarming under this value.
        above: alarming over this value.
        below_initial: alarming under this fraction of the mean of the run's first values.
        above_initial: alarming over this multiple of the mean of the run's first values.
        for_steps: training steps in a row that have to be alarming.
        action: "warn" says so, "stop" ends the training, "off" turns the monitor off.
    """

    below: float | None = None
    above: float | None = None
    below_initial: float | None = None
    above_initial: float | None = None
    for_steps: int = 1
    action: str = "warn"


Setting = Threshold | Mapping[str, Any] | None


@dataclass(frozen=True)
class Alarm:
    """A threshold that was passed for long enough.

    Attributes:
        monitor: name of the monitor, as in the configuration.
        value: the last value.
        step: the training step; None where the metrics carry none.
        message: one sentence for the user.
        action: "warn" or "stop".
    """

    monitor: str
    value: float
    step: int | None
    message: str
    action: str


@dataclass
class _Watch:
    """What one monitor remembers."""

    initial: list[float] = field(default_factory=list)
    steps_in_breach: int = 0
    last_step: int = 0
    raised: bool = False


@dataclass(eq=False)
class Monitors:
    """Watches the logged metrics.

    Args:
        entropy: mean entropy of the policy's next-token distribution, nats.
        repetition: mean share of a completion's 4-grams that repeat an earlier one, 0 to 1.
        distinct_2: distinct 2-grams over all 2-grams of a batch, 0 to 1. With G equal completions per prompt it is
            about 1/G, even when all of them are right.
        length: mean length of completions, tokens.
        length_growth: the same, beside its first values: `above_initial`.
        truncated: share of completions that reach rollout.max_completion_tokens without an end, 0 to 1.
        divergence_ends: the divergence at the first or the last distilled token of completions, whichever is larger, as
            a multiple of the mean over all distilled tokens, so at most the number of tokens: answers of ten tokens
            are never above 10. Not judged while that token's divergence is small (JUDGED_DIVERGENCE_NATS).
        reward_spread: mean over prompts of the standard deviation of the rewards of its completions. Not judged while
            a teacher gives signal (distill/active_fraction above 0).
        grad_norm: norm of the gradient before clipping; NaN is alarming.
        sampler_gap: mean absolute difference of the sampler's and the trainer's token log-probabilities, nats.
        unscored: share of the completions for which no reward gave a score, 0 to 1.
        update_ratio: how far one optimizer step moves the weights, relative to their size (of an adapter: those that it
            is added to); measured now and then.
        updated_fraction: share of the trained weights that such a step changes at all, 0 to 1.
        no_signal: alarming when no row has a teacher's signal and no prompt's rewards differ, or when the gradient's
            norm is under `below`.
        initial_values: how many values make up the mean that `below_initial` and `above_initial` refer to.

    Raises:
        UserError: a threshold has unknown keys, wrong types, or an unknown action.
    """

    entropy: Setting = None
    repetition: Setting = None
    distinct_2: Setting = None
    length: Setting = None
    length_growth: Setting = None
    truncated: Setting = None
    divergence_ends: Setting = None
    reward_spread: Setting = None
    grad_norm: Setting = None
    sampler_gap: Setting = None
    unscored: Setting = None
    update_ratio: Setting = None
    updated_fraction: Setting = None
    no_signal: Setting = None
    initial_values: int = 5

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "initial_values"}
        thresholds = {name: _threshold(name, value) for name, value in given.items() if value is not None}
        self.thresholds = {name: threshold for name, threshold in thresholds.items() if threshold.action != "off"}
        if self.initial_values < 1:
            raise UserError(f"monitors.initial_values is {self.initial_values}; it must be at least 1.")
        self.reset()

    def reset(self) -> None:
        """Forget everything that was observed."""
        self._watches = {name: _Watch() for name in self.thresholds}

    @property
    def can_stop(self) -> bool:
        """Whether any monitor may end the training."""
        return any(threshold.action == "stop" for threshold in self.thresholds.values())

    @property
    def alarming(self) -> list[str]:
        """Monitors whose last value was alarming, whether long enough for an alarm or not."""
        return [name for name, watch in self._watches.items() if watch.steps_in_breach > 0]

    def observe(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Look at the metrics of one logged step; deterministic, so that a resumed run can replay its past.

        Args:
            metrics: by name, TRL's or the standard ones, and `step`; without `step` each call counts as one step.
                A metric that is missing or None leaves its monitor as it was.

        Returns:
            alarms that begin now. One that goes on is not repeated; one that ends can begin again.
        """
        named = standard_names(metrics)
        step = named.get("step")
        alarms = []
        for name, threshold in self.thresholds.items():
            watch = self._watches[name]
            verdict = self._judge(name, threshold, watch, named)
            if verdict is None:
                continue
            value, reason = verdict
            elapsed = 1 if step is None else max(step - watch.last_step, 0)
            watch.last_step = watch.last_step + 1 if step is None else step
            if not reason:
                watch.steps_in_breach, watch.raised = 0, False
                continue
            watch.steps_in_breach += elapsed
            if watch.steps_in_breach >= threshold.for_steps and not watch.raised:
                watch.raised = True
                since = f" for {watch.steps_in_breach} steps" if watch.steps_in_breach > 1 else ""
                message = f"{name}: {reason}{since}: {_HINTS[name]}."
                alarms.append(Alarm(name, value, step, message, threshold.action))
        return alarms

    def _judge(
        self, name: str, threshold: Threshold, watch: _Watch, named: Mapping[str, Any]
    ) -> tuple[float, str] | None:
        """The value and why it is alarming ("" if it is not); None where there is nothing to judge."""
        if name == "no_signal":
            return _judge_signal(threshold, named)
        value = named.get(METRIC_OF.get(name, f"monitor/{name}"))
        if value is None:
            return None
        if name == "reward_spread" and (named.get("distill/active_fraction") or 0.0) > 0.0:
            return value, ""
        if math.isnan(value):
            return (value, "it is not a number") if name == "grad_norm" else None
        reason = ""
        if threshold.below_initial is not None or threshold.above_initial is not None:
            if len(watch.initial) < self.initial_values:
                watch.initial.append(value)
            else:
                reason = _beside(fmean(watch.initial), value, threshold)
        if threshold.below is not None and value < threshold.below:
            reason = f"{value:.3g} is below {threshold.below:g}"
        elif threshold.above is not None and value > threshold.above:
            reason = f"{value:.3g} is above {threshold.above:g}"
        return value, reason


def _beside(initial: float, value: float, threshold: Threshold) -> str:
    """Why a value is alarming beside the first ones; empty where it is not."""
    below, above = threshold.below_initial, threshold.above_initial
    if below is not None and value < below * initial:
        return f"{value:.3g} is below {below:g} of its first {initial:.3g}"
    if above is not None and value > above * initial:
        return f"{value:.3g} is above {above:g} times its first {initial:.3g}"
    return ""


def _judge_signal(threshold: Threshold, named: Mapping[str, Any]) -> tuple[float, str] | None:
    sources = [named.get(name) for name in ("distill/active_fraction", "monitor/reward_spread", "cross_entropy")]
    known = [source for source in sources if source is not None]
    grad_norm = named.get("monitor/grad_norm")
    if known and all(source < 1e-8 for source in known):
        return 0.0, "rewards do not differ within any prompt and no row has a teacher's signal"
    if grad_norm is not None and grad_norm < (1e-8 if threshold.below is None else threshold.below):
        return grad_norm, f"the gradient's norm is {grad_norm:.1g}"
    return (0.0, "") if known or grad_norm is not None else None


def _threshold(name: str, value: Threshold | Mapping[str, Any]) -> Threshold:
    """A checked threshold. YAML reads a bare `off` as false, so that false means "off" here."""
    key, defaults = f"monitors.{name}", asdict(Threshold())
    values = defaults | (asdict(value) if isinstance(value, Threshold) else dict(value))
    if unknown := sorted(values.keys() - defaults.keys()):
        raise UserError(f"{key}.{unknown[0]} is unknown; a monitor takes {', '.join(sorted(defaults))}.")
    if values["action"] is False:
        values["action"] = "off"
    if values["action"] not in ACTIONS:
        raise UserError(f"{key}.action is {values['action']!r}; write one of {', '.join(ACTIONS)}.")
    for limit in ("below", "above", "below_initial", "above_initial"):
        if mismatch(values[limit], float | None):
            raise UserError(f"{key}.{limit} is {values[limit]!r}; write a number, or null for no such limit.")
    if mismatch(values["for_steps"], int) or values["for_steps"] < 1:
        raise UserError(f"{key}.for_steps is {values['for_steps']!r}; write a whole number of at least 1.")
    return Threshold(**values)


def standard_names(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `metrics` with the standard names in place of TRL's, so that each metric has one; ours has the say."""
    named = {name: value for name, value in metrics.items() if name not in TRL_NAMES.values()}
    for standard, trl in TRL_NAMES.items():
        if trl in metrics:
            named.setdefault(standard, metrics[trl])
    if metrics.get("step_time") is not None and metrics.get("time/generate_s") is not None:
        elsewhere = sum(metrics.get(name) or 0.0 for name in ("time/generate_s", "time/reward_s", "time/teacher_s"))
        named.setdefault("time/update_s", max(0.0, metrics["step_time"] - elsewhere))
    for name, value in metrics.items():
        if part := re.fullmatch(r"rewards/(.+)/mean", name):
            named.setdefault(f"reward/{part[1]}", value)
    ends = [metrics.get(f"distill/divergence_{end}") or 0.0 for end in ("first", "last")]
    mean = metrics.get("distill/divergence")
    if mean is not None:
        dominate = max(ends) / mean if mean > 0 and max(ends) >= JUDGED_DIVERGENCE_NATS else 1.0
        named.setdefault("monitor/divergence_ends", dominate)
    # TRL's reward_std is over the whole batch, so it also counts differences between prompts, which teach nothing.
    if metrics.get("reward_std") is not None:
        spread = 0.0 if metrics.get("frac_reward_zero_std") == 1.0 else metrics["reward_std"]
        named.setdefault("monitor/reward_spread", spread)
    return named
