"""Our keys as TRL's arguments."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from selfdistill import UserError, config
from selfdistill.config.schema import Training
from selfdistill.config.trl_names import OUR_KEYS, OWN_WORDS
from selfdistill.training import arguments as trl_arguments
from selfdistill.training.arguments import ARGUMENTS, SelfDistillConfig, trainer_arguments
from tests.command import composed


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
    for name in {field.name for field in fields(Training)} - OWN_WORDS:
        assert getattr(given, name) == getattr(run.training, name), name
    assert (given.epsilon, given.top_k) == (0.1, 5)
    # The run deletes old checkpoints itself.
    assert (given.save_strategy, given.save_steps, given.save_total_limit) == ("steps", 50, None)


def test_other_arguments_are_passed_on(tmp_path: Path) -> None:
    _, given = arguments(tmp_path, "+training.arguments.optim=sgd", "+training.arguments.adam_beta2=0.9")
    assert (given.optim, given.adam_beta2) == ("sgd", 0.9)


@pytest.mark.long
def test_every_argument_that_a_run_sets_has_a_key_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every one that is said to have one exists, so that neither list goes stale."""
    written: dict[str, Any] = {}

    def kept(**given: Any) -> SelfDistillConfig:
        written.update(given)
        return SelfDistillConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)

    monkeypatch.setattr(trl_arguments, "SelfDistillConfig", kept)
    run, _ = arguments(tmp_path, "hardware.vllm.mode=server", "hardware.vllm.server_base_url=http://x", "hardware=auto")
    trainer_arguments(run, tmp_path)
    assert set(written) <= OUR_KEYS.keys() <= ARGUMENTS
    for key in filter(None, OUR_KEYS.values()):
        assert OmegaConf.select(composed(["reward=mix"]), key, default="none") != "none", key


def test_epochs_in_place_of_steps(tmp_path: Path) -> None:
    _, given = arguments(tmp_path, "epochs=3")
    assert (given.max_steps, given.num_train_epochs) == (-1, 3.0)
    _, given = arguments(tmp_path, "epochs=3", "dry_run=true")
    assert given.max_steps == 1


def test_what_trl_refuses_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^training: trl\.GRPOConfig refuses"):
        arguments(tmp_path, "+training.arguments.generation_batch_size=5")
