"""The trainer's settings: one declaration of what they may be, for the command line and for Python."""

from dataclasses import fields

import pytest

from selfdistill import Distillation, RolloutSource, UserError, config
from selfdistill.losses import MODES
from tests.command import composed


def test_the_run_holds_the_objects_that_the_trainer_takes() -> None:
    run = config.check(composed(["reward=none", "teacher=demonstration", "alpha=0.25", "distillation.top_k=7"]))
    assert run.distillation == Distillation(alpha=0.25, top_k=7, policy_weight=0.0)
    assert isinstance(run.rollout, RolloutSource)
    with pytest.raises(AttributeError):
        run.distillation.alpha = 0.5  # type: ignore[misc]


def test_the_command_line_has_the_defaults_of_python() -> None:
    """All but the policy gradient's weight, which in Python a teacher sets to 0."""
    run = config.check(composed())
    for settings, defaults in ((run.distillation, Distillation()), (run.rollout, RolloutSource())):
        for field in fields(defaults):
            if field.name != "policy_weight":
                assert getattr(settings, field.name) == getattr(defaults, field.name), field.name
    assert (run.distillation.policy_weight, Distillation().policy_weight) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("given", "written", "wrong"),
    [
        ("alpha=7", "alpha=7", {"alpha": 7}),
        ("distillation.alpha=7", "distillation.alpha=7", {"alpha": 7}),
        ("distillation.top_k=0", "distillation.top_k=0", {"top_k": 0}),
        ("distillation.is_clip=0", "distillation.is_clip=0", {"is_clip": 0}),
        ("distillation.route=some", "distillation.route=some", {"route": "some"}),
        ("policy_weight=-1", "policy_weight=-1", {"policy_weight": -1}),
        (
            "distillation.success_threshold=inf",
            "distillation.success_threshold=inf",
            {"success_threshold": float("inf")},
        ),
    ],
)
def test_one_range_for_both(given: str, written: str, wrong: dict) -> None:
    overrides = ["reward=exact_match", "teacher=feedback", given]
    with pytest.raises(UserError) as from_command_line:
        config.check(composed(overrides), overrides)
    with pytest.raises(UserError) as from_python:
        Distillation(**wrong)
    assert str(from_command_line.value).startswith(written)
    rest = str(from_command_line.value).removeprefix(written)
    assert str(from_python.value) == f"distillation.{written.removeprefix('distillation.')}{rest}"


@pytest.mark.parametrize("wrong", [{"on_policy_fraction": 2.0}, {"cross_entropy_weight": -1.0}])
def test_the_source_of_rollouts_has_ranges(wrong: dict) -> None:
    with pytest.raises(ValueError, match=rf"rollout\.{next(iter(wrong))}=.* is out of range"):
        RolloutSource(**wrong)


def test_the_aggregations_are_those_of_the_losses() -> None:
    for mode in MODES:
        Distillation(aggregation=mode)
    with pytest.raises(UserError, match=f"write one of {', '.join(MODES)}"):
        Distillation(aggregation="mean")


def test_texts_may_look_like_numbers() -> None:
    run = config.check(composed(["name=3", "tags=[1,b]"]))
    assert (run.name, run.tags) == ("3", ["1", "b"])
