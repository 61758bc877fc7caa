"""What we take from the installed TRL: an upgrade that breaks us says so in one line."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from transformers import Trainer

from selfdistill import Distillation, SelfDistillTrainer, Teacher
from selfdistill.teachers.weights import Ema
from selfdistill.training.checkpoints import ResumableSampler
from selfdistill.training.rollout_trainer import RolloutTrainer
from tests.reference import golden
from tests.training.naive import Hint, by_length, make

# What TRL calls these methods with, and what we pass on.
OVERRIDDEN = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "_generate": ["self", "prompts"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
    "_get_per_token_logps_and_entropies": ["self", "model"],
    "_get_train_sampler": ["self", "dataset"],
    "_prepare_inputs": ["self", "generation_batch"],
    "log": ["self", "logs", "start_time"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_tokenize_prompts": ["self", "prompts"],
    "_run_epoch": [
        "self", "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
        "ignore_keys_for_eval", "start_time", "resume_from_checkpoint",
    ],
}  # fmt: skip
OF_TRANSFORMERS = ("_load_from_checkpoint", "_run_epoch")
CALLED = {
    "_load_rng_state": ["self", "checkpoint"],
}
STATE = (
    "_buffered_inputs", "_step", "_metrics", "_tokenizer", "beta", "temperature", "num_iterations", "reward_weights",
    "max_completion_length", "current_gradient_accumulation_steps", "mask_truncated_completions", "ref_model",
    "num_generations", "num_generations_eval", "shuffle_dataset", "aux_loss_enabled", "eos_token_ids",
    "generation_config", "generation_kwargs", "chat_template", "chat_template_kwargs", "tools",
    "environment_factories", "_is_vlm", "reward_funcs", "reward_func_names", "reward_processing_classes",
)  # fmt: skip


def names(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("method", [*OVERRIDDEN, *CALLED])
def test_signatures(method: str) -> None:
    wanted = {**OVERRIDDEN, **CALLED}[method]
    theirs = names(getattr(trl.GRPOTrainer, method))
    if theirs[: len(wanted)] != wanted:
        pytest.fail(
            f"trl {trl.__version__}: GRPOTrainer.{method}({', '.join(theirs)}) no longer begins with "
            f"({', '.join(wanted)}); selfdistill/training/trainer.py must follow it",
            pytrace=False,
        )


@pytest.mark.parametrize("method", [m for m in OVERRIDDEN if m not in OF_TRANSFORMERS])
def test_what_we_override_is_still_there(method: str) -> None:
    assert any(method in vars(ours) for ours in (SelfDistillTrainer, RolloutTrainer))
    assert method in vars(trl.GRPOTrainer), f"trl {trl.__version__}: GRPOTrainer.{method} is gone"


def test_checkpoints_load_through_the_hook() -> None:
    assert set(OF_TRANSFORMERS) <= vars(Trainer).keys()
    assert names(Trainer.save_model) == ["self", "output_dir", "_internal_call"]
    assert names(Trainer._get_output_dir) == ["self", "trial"]


def test_state_that_is_read(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, teacher=Teacher(context=Hint()))
    for name in STATE:
        if name != "current_gradient_accumulation_steps":  # set when the training begins
            assert hasattr(trainer, name), f"trl {trl.__version__}: GRPOTrainer has no {name}"
    trainer.train()
    assert hasattr(trainer, "current_gradient_accumulation_steps")
    assert trainer._step == 4


def test_the_student_is_sharded_before_its_checkpoint_is_loaded() -> None:
    """A teacher takes its shards in between."""
    source = inspect.getsource(Trainer._prepare_for_training)
    assert names(Trainer._prepare_for_training)[1:] == ["max_steps", "train_dataloader", "resume_from_checkpoint"]
    calls = ("self.accelerator.prepare(", "self.model = self.model_wrapped = model", "self._load_from_checkpoint(")
    places = [source.index(call) for call in calls]
    assert places == sorted(places)


# Each hook takes up what the one before it left on the rollouts.
ORDER = [
    "_prepare_inputs",
    "_generate_and_score_completions",
    "_generate",
    "_tokenize_prompts",
    "_generate_single_turn",
    "_get_per_token_logps_and_entropies of the policy",
    "_get_per_token_logps_and_entropies of the reference",
    "_calculate_rewards",
    "_compute_loss",
    "_get_per_token_logps_and_entropies with gradient",
    "_prepare_inputs",
    "_compute_loss",
    "_get_per_token_logps_and_entropies with gradient",
    "log",
]


def test_trl_calls_the_hooks_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        ours = getattr(SelfDistillTrainer, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            scored = ""
            if name == "_get_per_token_logps_and_entropies":
                without_gradient = " of the policy" if args[0] is self.model else " of the reference"
                scored = " with gradient" if torch.is_grad_enabled() else without_gradient
            called.append(name + scored)
            return ours(self, *args, **kwargs)

        return call

    for name in OVERRIDDEN:
        if name not in ("_get_train_sampler", "_save_checkpoint", *OF_TRANSFORMERS):
            monkeypatch.setattr(SelfDistillTrainer, name, noted(name))
    # Rollouts that serve more than one optimizer step make TRL ask for the policy's log-probabilities too.
    args = {"max_steps": 1, "beta": 0.04, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    trainer, _ = make(tmp_path, teacher=Teacher(Ema(), Hint()), reward_funcs=by_length, args=args)
    trainer.train()
    assert called[: len(ORDER)] == ORDER, f"trl {trl.__version__} calls the hooks in another order"


def test_environments_state_is_read_where_it_was() -> None:
    source = inspect.getsource(trl.GRPOTrainer._tokenize_prompts)
    assert "self._env_tools[name] or None" in source
    assert "zip(prompts, self._batch_environments, strict=True)" in source


RUNS: dict[str, dict] = {
    "grpo": {"args": {"beta": 0.04, "learning_rate": 0.5}, "reward_funcs": by_length},
    "sdft": {"teacher": Teacher(Ema(), Hint()), "distillation": Distillation(alpha=0.0)},
    "sdpo": {
        "teacher": Teacher(Ema(), Hint()), "distillation": Distillation(top_k=20, policy_weight=0.5),
        "reward_funcs": by_length,
    },
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_two_steps_of_each_kind(run: str, tmp_path: Path) -> None:
    trainer, batches = make(tmp_path, **RUNS[run])
    trainer.train()
    lines = trainer.state.log_history
    assert trainer.state.global_step == len(batches) == 2
    assert all(line["grad_norm"] > 0 for line in lines if "grad_norm" in line)
    if run == "grpo":
        assert lines[1]["kl"] > lines[0]["kl"] == pytest.approx(0.0, abs=1e-7)


def test_the_order_of_the_rows_is_trls() -> None:
    settings = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "shuffle": True, "seed": 5}
    theirs = trl.trainer.grpo_trainer.RepeatSampler(list(range(7)), **settings)
    ours = ResumableSampler(list(range(7)), **settings)
    epochs = [list(theirs) for _ in range(3)]
    for epoch in (0, 1, 2, 1):
        ours.set_epoch(epoch)
        assert list(ours) == epochs[epoch]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("name", sorted(name for name in golden("grpo")[0] if name.startswith("adv_")))
def test_advantages_are_the_reference_values(name: str, tmp_path: Path) -> None:
    """Groups, scaling, weights and rows that no reward applies to, as TRL computes them from our adapter's scores."""
    cases, arrays = golden("grpo")
    rewards = arrays[f"{name}/in_rewards_per_func"]
    functions = []
    for column in rewards.T:

        def reward(completions: list, values: np.ndarray = column, **_: Any) -> list[dict]:
            return [{"score": None if np.isnan(v) else float(v), "feedback": "x"} for v in values]

        functions.append(reward)
    args = {
        "scale_rewards": cases[name]["scale_rewards"],
        "multi_objective_aggregation": cases[name]["multi_objective_aggregation"],
        "reward_weights": cases[name]["reward_weights"],
        "max_steps": 1,
    }
    trainer, batches = make(tmp_path, args=args, reward_funcs=functions)
    trainer.train()
    expected = torch.tensor(arrays[f"{name}/out_advantages"])
    torch.testing.assert_close(batches[0].advantages, torch.nan_to_num(expected), rtol=2e-5, atol=2e-6)
