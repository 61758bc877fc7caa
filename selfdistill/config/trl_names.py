"""Which arguments of `trl.GRPOConfig` have a key of ours: these are set there, and not in `training.arguments`."""

from dataclasses import fields

from selfdistill.config.schema import Training

OWN_WORDS = {"checkpoint_every", "keep_checkpoints", "arguments"}  # keys of `training` that TRL calls otherwise
_SAME_IN_ROLLOUT = ("temperature", "top_p", "top_k", "min_p")

# TRL's argument -> our key; "" where a run needs the value that it has.
OUR_KEYS = {
    **{field.name: f"training.{field.name}" for field in fields(Training) if field.name not in OWN_WORDS},
    **{name: f"rollout.{name}" for name in _SAME_IN_ROLLOUT},
    **{name: name for name in ("seed", "beta", "num_generations", "max_steps", "learning_rate", "output_dir")},
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "hardware.per_device_batch_size",
    "gradient_accumulation_steps": "hardware.accumulation_steps",
    "gradient_checkpointing": "hardware.gradient_checkpointing",
    "use_cpu": "hardware.device",
    "bf16": "hardware.precision",
    "fp16": "hardware.precision",
    "max_completion_length": "rollout.max_completion_tokens",
    "chat_template_kwargs": "model.chat_template_kwargs",
    "reward_weights": "reward.weights",
    "save_strategy": "training.checkpoint_every",
    "save_steps": "training.checkpoint_every",
    "save_total_limit": "training.keep_checkpoints",
    "load_best_model_at_end": "keep_best",
    "metric_for_best_model": "keep_best",
    "report_to": "logger",
    "run_name": "name",
    "use_vllm": "hardware.vllm.mode",
    "vllm_mode": "hardware.vllm.mode",
    "vllm_enable_sleep_mode": "hardware.vllm.standby",
    "vllm_gpu_memory_utilization": "hardware.vllm.gpu_memory_utilization",
    "vllm_tensor_parallel_size": "hardware.vllm.tensor_parallel_size",
    "vllm_max_model_length": "hardware.vllm.max_model_tokens",
    "vllm_server_base_url": "hardware.vllm.server_base_url",
    "disable_tqdm": "",
    "dataloader_pin_memory": "",
    "remove_unused_columns": "",
}


def instead_of(argument: str) -> str:
    """What to write instead of `training.arguments.ARGUMENT`, as the end of a sentence."""
    key = OUR_KEYS[argument]
    return f"this argument has a key of its own: write {key}=…" if key else "a run needs the value that it has."
