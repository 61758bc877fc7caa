"""TRL's GRPO trainer as TRL wrote it, whatever was imported before."""

from selfdistill.training.unsloth import put_trl_back

put_trl_back()

from trl import GRPOConfig, GRPOTrainer  # noqa: E402

__all__ = ["GRPOConfig", "GRPOTrainer"]
