import math

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from selfdistill.config.conf import CONF
from selfdistill.errors import UserError
from selfdistill.evaluation.monitors import Monitors, Threshold, standard_names


def composed(name: str, *overrides: str) -> Monitors:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return instantiate(compose(overrides=[f"+monitors={name}", *overrides]).monitors)


def steps_of_alarms(monitors: Monitors, metrics: list[dict]) -> list[int]:
    return [step for step, values in enumerate(metrics, start=1) if monitors.observe({**values, "step": step})]


def test_a_metric_has_one_name_and_ours_has_the_say():
    logs = {"entropy": 0.5, "reward_std": 0.3, "frac_reward_zero_std": 1.0, "monitor/grad_norm": 1.0, "grad_norm": 2.0}
    named = standard_names({**logs, "step_time": 0.1, "completions/mean_length": 9.0})
    assert not named.keys() & {"entropy", "grad_norm", "step_time", "completions/mean_length"}
    assert (named["reward_std"], named["monitor/grad_norm"]) == (0.3, 1.0)
    assert named["monitor/entropy"] == 0.5
    assert named["monitor/reward_spread"] == 0.0
    assert named["monitor/length_tokens"] == 9.0
    assert named["time/step_s"] == 0.1
    assert standard_names({"reward_std": 0.3, "frac_reward_zero_std": 0.5})["monitor/reward_spread"] == 0.3


def test_an_alarm_needs_its_steps_in_a_row_and_is_raised_once():
    monitors = Monitors(repetition=Threshold(above=0.5, for_steps=3))
    values = [0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9]
    assert steps_of_alarms(monitors, [{"monitor/repetition": value} for value in values]) == [6, 12]


@pytest.mark.parametrize(
    ("metric", "value", "steps", "told"),
    [
        ("monitor/update_ratio", 1e-6, [1, 11, 21, 31], "the weights hardly move; raise learning_rate"),
        ("monitor/updated_fraction", 0.08, [1, 11, 21, 31], "model.dtype=float32"),
        ("monitor/unscored", 1.0, [1, 2, 3, 4], "the reward returns None"),
        ("sampling/sampling_logp_difference/mean", 0.2, [1, 2, 3, 4], "the sampler's log-probabilities differ"),
    ],
)
def test_what_goes_wrong_is_told_early(metric: str, value: float, steps: list[int], told: str) -> None:
    monitors = composed("default")
    alarms = [alarm for step in steps for alarm in monitors.observe({"step": step, metric: value})]
    assert [alarm.step for alarm in alarms] == [steps[2]]
    assert told in alarms[0].message
    assert not composed("off").observe({"step": 100, metric: value})


def test_each_reward_has_a_mean_of_its_own() -> None:
    assert standard_names({"rewards/form/mean": 0.5, "rewards/form/std": 0.1})["reward/form"] == 0.5


def test_a_limit_itself_is_not_alarming():
    monitors = Monitors(length=Threshold(below=2.0, above=10.0))
    assert steps_of_alarms(monitors, [{"monitor/length_tokens": v} for v in (2.0, 10.0, 1.9, 5.0, 10.1)]) == [3, 5]


def test_steps_between_logged_lines_count():
    monitors = Monitors(repetition=Threshold(above=0.5, for_steps=20))
    assert monitors.observe({"step": 10, "monitor/repetition": 0.9}) == []
    alarm = monitors.observe({"step": 20, "monitor/repetition": 0.9})[0]
    assert (alarm.monitor, alarm.step, alarm.value, alarm.action) == ("repetition", 20, 0.9, "warn")
    assert "0.9 is above 0.5 for 20 steps" in alarm.message


def test_the_same_step_counts_once():
    monitors = Monitors(repetition=Threshold(above=0.5, for_steps=2))
    assert monitors.observe({"step": 1, "monitor/repetition": 0.9}) == []
    assert monitors.observe({"step": 1, "monitor/repetition": 0.9}) == []
    assert len(monitors.observe({"step": 2, "monitor/repetition": 0.9})) == 1


def test_without_steps_each_call_is_one():
    monitors = Monitors(repetition=Threshold(above=0.5, for_steps=2))
    assert [len(monitors.observe({"monitor/repetition": 0.9})) for _ in range(3)] == [0, 1, 0]


def test_a_missing_value_changes_nothing():
    monitors = Monitors(repetition=Threshold(above=0.5, for_steps=2))
    metrics = [
        {"monitor/repetition": 0.9},
        {"eval/accuracy": 1.0},
        {"monitor/repetition": None},
        {"monitor/repetition": 0.9},
    ]
    assert steps_of_alarms(monitors, metrics) == [4]


def test_collapse_of_the_entropy_relative_to_its_first_values():
    monitors = Monitors(entropy=Threshold(below_initial=0.2, for_steps=2))
    # TRL's name; the mean of the first five is 1.0, so that the limit is 0.2.
    values = [0.8, 1.2, 0.1, 1.9, 1.0, 0.25, 0.19, 0.21, 0.19, 0.18]
    assert steps_of_alarms(monitors, [{"entropy": value} for value in values]) == [10]


def test_growth_of_the_length_relative_to_its_first_values():
    lengths = [10.0, 12.0, 14.0, 30.0, 40.0, 40.0, 40.0]
    monitors = Monitors(length_growth={"above_initial": 3.0, "for_steps": 2}, initial_values=3)
    (alarm,) = [a for length in lengths for a in monitors.observe({"completions/mean_length": length})]
    assert "40 is above 3 times its first 12 for 2 steps" in alarm.message
    assert "teacher.chat_template_kwargs" in alarm.message


def test_answers_without_an_end():
    monitors = Monitors(truncated={"above": 0.5})
    alarms = [a for share in (0.4, 0.9) for a in monitors.observe({"completions/clipped_ratio": share})]
    assert [alarm.value for alarm in alarms] == [0.9]
    assert "rollout.max_completion_tokens" in alarms[0].message


@pytest.mark.parametrize("first, last, mean, alarming", [
    (0.3, 5.0, 0.2, True), (5.0, None, 0.2, True), (0.5, 1.0, 0.2, False), (0.01, 0.4, 0.001, False),
    (None, None, None, False), (0.0, 0.0, 0.0, False),
])  # fmt: skip
def test_a_divergence_that_lies_at_the_ends(first, last, mean, alarming):
    ends = {"distill/divergence": mean, "distill/divergence_first": first, "distill/divergence_last": last}
    alarms = composed("default").observe({"step": 1, **ends})
    assert [alarm.monitor for alarm in alarms] == ["divergence_ends"] * alarming


def test_a_gradient_that_is_not_a_number():
    monitors = Monitors(grad_norm=Threshold(above=100.0), entropy=Threshold(below=0.1))
    assert steps_of_alarms(monitors, [{"grad_norm": 1.0}, {"grad_norm": math.nan}]) == [2]
    assert steps_of_alarms(monitors, [{"grad_norm": 1.0, "entropy": math.nan}, {"grad_norm": math.inf}]) == [2]


@pytest.mark.parametrize(
    ("metrics", "alarming"),
    [
        ({"distill/active_fraction": 0.0, "monitor/reward_spread": 0.0, "grad_norm": 0.3}, True),
        ({"distill/active_fraction": 0.0, "monitor/reward_spread": 0.2}, False),
        ({"distill/active_fraction": 0.5, "monitor/reward_spread": 0.0}, False),
        ({"distill/active_fraction": 0.0}, True),
        ({"reward_std": 0.4, "frac_reward_zero_std": 1.0}, True),
        ({"reward_std": 0.4, "frac_reward_zero_std": 0.0}, False),
        ({"monitor/reward_spread": 0.2, "grad_norm": 0.0}, True),
        ({"grad_norm": 0.1}, False),
        ({"loss": 0.0}, False),
    ],
)
def test_no_signal(metrics, alarming):
    assert bool(Monitors(no_signal=Threshold()).observe(metrics)) is alarming


def test_equal_rewards_do_not_matter_while_a_teacher_teaches():
    monitors = Monitors(reward_spread=Threshold(below=1e-6))
    assert monitors.observe({"monitor/reward_spread": 0.0, "distill/active_fraction": 1.0}) == []
    assert len(monitors.observe({"monitor/reward_spread": 0.0, "distill/active_fraction": 0.0})) == 1


def test_a_replay_leads_to_the_same_state():
    metrics = [{"step": step, "entropy": value} for step, value in enumerate([1.0] * 5 + [0.1] * 4, start=1)]
    unbroken, resumed = (Monitors(entropy=Threshold(below_initial=0.2, for_steps=4)) for _ in range(2))
    expected = [unbroken.observe(line) for line in metrics]
    for line in metrics:
        resumed.observe(line)
    resumed.reset()
    for line in metrics[:7]:
        resumed.observe(line)
    assert [resumed.observe(line) for line in metrics[7:]] == expected[7:]
    assert expected[8]


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        ({"action": "halt"}, r"monitors\.entropy\.action is 'halt'; write one of warn, stop, off"),
        ({"action": True}, r"monitors\.entropy\.action is True"),
        ({"under": 1.0}, r"monitors\.entropy\.under is unknown; a monitor takes"),
        ({"below": "low"}, r"monitors\.entropy\.below is 'low'; write a number"),
        ({"above": True}, r"monitors\.entropy\.above is True"),
        ({"for_steps": 0}, r"monitors\.entropy\.for_steps is 0"),
        ({"for_steps": 1.5}, r"monitors\.entropy\.for_steps is 1\.5"),
    ],
)
def test_wrong_thresholds_are_named(threshold, message):
    with pytest.raises(UserError, match=message):
        Monitors(entropy=threshold)


def test_initial_values_must_be_positive():
    with pytest.raises(UserError, match=r"monitors\.initial_values is 0"):
        Monitors(initial_values=0)


def test_the_shipped_configurations():
    names = {"entropy", "repetition", "distinct_2", "length", "reward_spread", "grad_norm", "sampler_gap", "no_signal"}
    names |= {"length_growth", "truncated", "divergence_ends", "update_ratio", "updated_fraction", "unscored"}
    default, strict, off = (composed(name) for name in ("default", "strict", "off"))
    assert set(default.thresholds) == set(strict.thresholds) == names
    assert not default.can_stop
    assert strict.can_stop
    assert off.thresholds == {}
    assert strict.thresholds["reward_spread"].action == "warn"
    # The unquoted word, as a user writes it on the command line and in YAML.
    assert "entropy" not in composed("default", "monitors.entropy.action=off").thresholds
    assert "entropy" not in Monitors(entropy={"action": False}).thresholds


def test_the_defaults_are_silent_on_a_healthy_run_and_catch_a_collapse():
    healthy = {"entropy": 0.8, "monitor/repetition": 0.1, "monitor/distinct_2": 0.4, "completions/mean_length": 12.0}
    healthy |= {"reward_std": 0.3, "frac_reward_zero_std": 0.2, "grad_norm": 1.5}
    collapsed = healthy | {"entropy": 0.05, "monitor/repetition": 0.9, "monitor/distinct_2": 0.01}
    assert steps_of_alarms(composed("default"), [healthy] * 100) == []
    strict = composed("strict")
    alarms = steps_of_alarms(strict, [healthy] * 20 + [collapsed] * 10)
    assert alarms == [23, 25]
    assert set(strict.alarming) == {"entropy", "repetition", "distinct_2"}
