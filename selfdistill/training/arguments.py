"""Our keys in TRL's words."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, no_type_check

import torch

from selfdistill.config.batch import batch_of
from selfdistill.config.schema import Hardware, Run, Vllm
from selfdistill.config.secrets import masked
from selfdistill.errors import UserError, first_line
from selfdistill.training.trl_trainer import GRPOConfig


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

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled into training_args.bin, which lies beside published weights, holds no token."""
        return masked(vars(self))


ARGUMENTS = frozenset(field.name for field in fields(SelfDistillConfig))
# The number of steps of a run whose end a budget decides.
ENDLESS = 10**9


def use_cuda(hardware: Hardware) -> bool:
    """Whether this run is on a GPU: as configured, or as there is one.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "hardware.device=cuda: torch sees no GPU here. Write hardware=cpu, or hardware=auto to take what there is."
        )
    return hardware.device != "cpu" and torch.cuda.is_available()


def precision(hardware: Hardware) -> str:
    """bf16, fp16 or fp32."""
    if hardware.precision != "auto":
        return hardware.precision
    return "bf16" if use_cuda(hardware) and torch.cuda.is_bf16_supported() else "fp32"


def trainer_arguments(run: Run, output_dir: Path) -> SelfDistillConfig:
    """TRL's arguments from our groups, and those of `training.arguments`, which have no key of ours.

    Raises:
        UserError: TRL refuses a combination.
    """
    batch, rollout, kind = batch_of(run), run.rollout, precision(run.hardware)
    shared = asdict(run.training)  # what TRL calls by the same names, once ours are taken out
    # Old checkpoints are deleted by `checkpoints.rotate`, which keep_checkpoints is for.
    checkpoint_every, _, others = map(shared.pop, ("checkpoint_every", "keep_checkpoints", "arguments"))
    steps, epochs = (1, 0.0) if run.dry_run else (-1 if run.epochs else run.max_steps or ENDLESS, run.epochs or 0.0)
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": run.seed,
        "beta": run.beta,
        "num_generations": run.num_generations,
        "max_steps": steps,  # -1: as many as the epochs take
        "num_train_epochs": epochs,
        "learning_rate": run.learning_rate,
        "per_device_train_batch_size": batch.per_device,
        "gradient_accumulation_steps": batch.accumulation_steps,
        "gradient_checkpointing": run.hardware.gradient_checkpointing,
        "use_cpu": not use_cuda(run.hardware),
        "bf16": kind == "bf16",
        "fp16": kind == "fp16",
        **{name: getattr(rollout, name) for name in ("temperature", "top_p", "top_k", "min_p")},
        "max_completion_length": rollout.max_completion_tokens,
        "chat_template_kwargs": run.model.chat_template_kwargs or None,
        "save_strategy": "steps" if checkpoint_every else "no",
        "save_steps": checkpoint_every or 500,
        "save_total_limit": None,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": use_cuda(run.hardware),
        "remove_unused_columns": False,
    }
    try:
        return SelfDistillConfig(**shared | arguments | _vllm_arguments(run.hardware.vllm) | others)
    except (ValueError, TypeError) as error:
        raise UserError(f"training: trl.GRPOConfig refuses this combination: {first_line(error)}") from error


def _vllm_arguments(vllm: Vllm) -> dict[str, Any]:
    if not vllm.mode:
        return {}
    arguments = {
        "use_vllm": True,
        "vllm_mode": vllm.mode,
        "vllm_enable_sleep_mode": vllm.standby,
        "vllm_gpu_memory_utilization": vllm.gpu_memory_utilization,
        "vllm_tensor_parallel_size": vllm.tensor_parallel_size,
        "vllm_max_model_length": vllm.max_model_tokens,
    }
    return arguments | ({"vllm_server_base_url": vllm.server_base_url} if vllm.server_base_url else {})
