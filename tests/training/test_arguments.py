"""Our keys as TRL's arguments."""

from dataclasses import fields
from pathlib import Path

import pytest

from selfdistill import UserError, config
from selfdistill.config.schema import Training
from selfdistill.training.arguments import SelfDistillConfig, trainer_arguments
from tests.command import composed

OWN = {"checkpoint_every", "keep_checkpoints", "arguments"}


def arguments(folder: Path, *overrides: str) -> tuple[config.Run, SelfDistillConfig]:
    run = config.check(composed(["hardware=cpu", *overrides]))
    return run, trainer_arguments(run, folder)


def test_a_step_has_the_completions_that_were_asked_for(tmp_path: Path) -> None:
    _, given = arguments(tmp_path, "hardware.per_device_batch_size=4", "num_generations=8")
    assert (given.per_device_train_batch_size, given.gradient_accumulation_steps) == (4, 8)
    assert (given.generation_batch_size, given.num_generations) == (32, 8)


def test_keys_of_the_training_keep_their_names(tmp_path: Path) -> None:
    changed = ["epsilon=0.1", "epsilon_high=0.3", "loss_type=dapo", "num_iterations=2", "warmup_steps=3"]
    run, given = arguments(tmp_path, *(f"training.{key}" for key in changed), "rollout.top_k=5")
    for name in {field.name for field in fields(Training)} - OWN:
        assert getattr(given, name) == getattr(run.training, name), name
    assert (given.epsilon, given.top_k) == (0.1, 5)
    # The run deletes old checkpoints itself.
    assert (given.save_strategy, given.save_steps, given.save_total_limit) == ("steps", 50, None)


def test_other_arguments_have_the_last_word(tmp_path: Path) -> None:
    _, given = arguments(tmp_path, "+training.arguments.max_grad_norm=0.5", "+training.arguments.optim=sgd")
    assert (given.max_grad_norm, given.optim) == (0.5, "sgd")


def test_what_trl_refuses_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^training: trl\.GRPOConfig refuses"):
        arguments(tmp_path, "+training.arguments.generation_batch_size=5")
