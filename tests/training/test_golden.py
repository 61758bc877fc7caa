"""The policy gradient of our trainer against TRL's published values: what our hooks pass on must not change them."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from tests.reference import golden
from tests.training.naive import by_length, make, questions

CASES, ARRAYS = golden("grpo")


def of_kind(prefix: str) -> list[str]:
    return sorted(name for name in CASES if name.startswith(prefix))


def tensors(name: str) -> dict[str, Tensor]:
    return {key.split("/")[1]: torch.from_numpy(array) for key, array in ARRAYS.items() if key.startswith(f"{name}/")}


def scored_as(logps: Tensor) -> Any:
    """Makes TRL read these log-probabilities (B, T) instead of asking a model."""
    result = (logps, torch.zeros_like(logps).detach(), None)
    return patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", lambda *_, **__: result)


def policy_loss(name: str, logps: Tensor, x: dict[str, Tensor], folder: Path) -> Tensor:
    """The loss of our trainer for one case, where the policy gives its tokens these log-probabilities."""
    case, (rows, count) = CASES[name], logps.shape
    args = {
        "loss_type": case["loss_type"], "epsilon": case["epsilon_low"], "epsilon_high": case["epsilon_high"],
        "max_completion_length": case["max_completion_length"], "beta": case.get("beta", 0.0),
        "importance_sampling_level": case.get("importance_sampling_level", "token"),
        "use_bias_correction_kl": case.get("use_bias_correction_kl", True),
        "gradient_accumulation_steps": 1, "steps_per_generation": 1,
    }  # fmt: skip
    trainer, _ = make(folder, args=args, reward_funcs=by_length)
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop, which does not run here
    trainer.use_vllm = "in_vllm_is_ratio" in x  # set late, so that no engine is made
    trainer.model.train()
    inputs = {
        "prompt_ids": torch.ones(rows, 1, dtype=torch.long), "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.ones(rows, count, dtype=torch.long), "completion_mask": x["in_mask"].long(),
        "advantages": x["in_advantages"], "old_per_token_logps": x["in_old_logps"],
        "num_items_in_batch": x["in_mask"].sum(),
    }  # fmt: skip
    if "in_ref_logps" in x:
        inputs["ref_per_token_logps"] = x["in_ref_logps"]
    if trainer.use_vllm:
        inputs["importance_sampling_ratio"] = x["in_vllm_is_ratio"]
    with scored_as(logps):
        loss = trainer._compute_loss(trainer.model, inputs)
    if case.get("kl_metric"):
        assert trainer._metrics["train"]["kl"] == pytest.approx(case["kl_metric"])
    return loss


@pytest.mark.filterwarnings("ignore:When using `importance_sampling_level='sequence':UserWarning:trl")
@pytest.mark.parametrize("name", of_kind("loss_"))
def test_policy_loss(name: str, tmp_path: Path) -> None:
    x = tensors(name)
    logps = x["in_logps"].requires_grad_()
    loss = policy_loss(name, logps, x, tmp_path)
    torch.testing.assert_close(loss, x["out_loss"], rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(gradient, x["grad_logps"], rtol=1e-9, atol=1e-12)


def test_policy_loss_of_sdpo(tmp_path: Path) -> None:
    (name,) = of_kind("sdpo_policy")
    x = tensors(name)
    logits = x["in_student_logits"].requires_grad_()
    logps = logits.log_softmax(-1).gather(-1, x["in_completion_ids"][..., None]).squeeze(-1)
    loss = policy_loss(name, logps, x, tmp_path)
    torch.testing.assert_close(loss, x["out_loss"], rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, x["grad_student_logits"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", of_kind("vllm_is"))
def test_importance_ratio_of_what_vllm_sampled(name: str, tmp_path: Path) -> None:
    x, case = tensors(name), CASES[name]
    args = {
        "vllm_importance_sampling_mode": case["mode"],
        "vllm_importance_sampling_clip_min": case["clip_min"],
        "vllm_importance_sampling_clip_max": case["clip_max"],
    }
    trainer, _ = make(tmp_path, args=args, reward_funcs=by_length)
    lengths = x["in_completion_mask"].sum(1).tolist()
    sampled = [[20] * length for length in lengths]
    logprobs = [row[:length].tolist() for row, length in zip(x["in_sampling_logps"], lengths, strict=True)]
    trainer.use_vllm = True  # set late, so that no engine is made
    trainer.model.train()
    with (
        patch.object(GRPOTrainer, "_generate_single_turn", lambda *_, **__: (sampled, logprobs)),
        scored_as(x["in_old_logps"]),
    ):
        output = trainer._generate_and_score_completions([questions(1)[0]] * len(lengths))
    torch.testing.assert_close(output["importance_sampling_ratio"], x["out_ratio"], rtol=2e-5, atol=1e-6)
