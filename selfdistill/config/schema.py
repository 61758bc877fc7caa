"""The schema of a composed run: the keys that exist, their types, ranges and choices. What a `_target_` builds is open."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Lora:
    r: int = 32
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Any = "all-linear"


@dataclass
class Model:
    name: str
    loader: str
    tuning: str
    lora: Lora
    dtype: str
    load_in_4bit: bool
    attn_implementation: str | None
    revision: str | None
    trust_remote_code: bool
    local_files_only: bool
    adapter_path: str | None
    max_seq_tokens: int
    max_completion_tokens: int
    learning_rate: float
    chat_template_kwargs: dict[str, Any]
    retention_path: str | None
    parameters_billion: float | None


@dataclass
class Vllm:
    mode: str | None
    gpu_memory_utilization: float
    standby: bool
    server_base_url: str | None
    tensor_parallel_size: int
    max_model_tokens: int


@dataclass
class Hardware:
    device: str
    precision: str
    per_device_batch_size: int
    accumulation_steps: int
    gradient_checkpointing: bool
    memory_gib: float | None
    threads: int | None
    vllm: Vllm


@dataclass
class Rollout:
    temperature: float
    top_p: float
    top_k: int
    min_p: float | None
    max_completion_tokens: int
    on_policy_fraction: float
    from_teacher: bool
    demonstration_field: str
    cross_entropy_weight: float


@dataclass
class Distillation:
    alpha: float
    top_k: int | None
    tail: bool
    signal: str
    temperature: float | None
    is_clip: float | None
    skip_tokens: int
    pointwise_clip: float | None
    jsd_normalize: bool
    aggregation: str
    count_inactive_rows: bool
    weight: float
    policy_weight: float
    route: str
    success_threshold: float


@dataclass
class Training:
    loss_type: str
    scale_rewards: str
    num_iterations: int
    epsilon: float
    epsilon_high: float | None
    mask_truncated_completions: bool
    lr_scheduler_type: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    logging_steps: int
    checkpoint_every: int
    keep_checkpoints: int
    arguments: dict[str, Any]


@dataclass
class Run:
    """The root. The groups typed Any are None or have a `_target_`, whose signature they are bound against later."""

    seed: int
    beta: float
    alpha: float
    num_generations: int
    max_steps: int
    learning_rate: float
    policy_weight: float
    name: str | None
    group: str | None
    tags: list[str]
    output_dir: str
    resume: str | None
    check: bool
    dry_run: bool
    allow_code_execution: bool
    trusted_prefixes: list[str]
    rollout: Rollout
    distillation: Distillation
    training: Training
    model: Model
    hardware: Hardware
    data: Any
    reward: Any
    teacher: Any
    eval: Any
    monitors: Any
    logger: Any
    export: Any


# key -> (lowest, highest); those in POSITIVE must be above their lowest
RANGES: dict[str, tuple[float, float | None]] = {
    "seed": (0, 2**32 - 1),
    "beta": (0, None),
    "alpha": (0, 1),
    "num_generations": (1, None),
    "max_steps": (1, None),
    "learning_rate": (0, None),
    "policy_weight": (0, None),
    "rollout.temperature": (0, None),
    "rollout.top_p": (0, 1),
    "rollout.top_k": (0, None),
    "rollout.min_p": (0, 1),
    "rollout.max_completion_tokens": (1, None),
    "rollout.on_policy_fraction": (0, 1),
    "rollout.cross_entropy_weight": (0, None),
    "distillation.alpha": (0, 1),
    "distillation.top_k": (1, None),
    "distillation.temperature": (0, None),
    "distillation.is_clip": (0, None),
    "distillation.skip_tokens": (0, None),
    "distillation.pointwise_clip": (0, None),
    "distillation.weight": (0, None),
    "distillation.policy_weight": (0, None),
    "training.num_iterations": (1, None),
    "training.epsilon": (0, 1),
    "training.epsilon_high": (0, None),
    "training.warmup_steps": (0, None),
    "training.weight_decay": (0, None),
    "training.max_grad_norm": (0, None),
    "training.logging_steps": (1, None),
    "training.checkpoint_every": (0, None),
    "training.keep_checkpoints": (1, None),
    "model.lora.r": (1, None),
    "model.lora.alpha": (1, None),
    "model.lora.dropout": (0, 1),
    "model.max_seq_tokens": (1, None),
    "model.max_completion_tokens": (1, None),
    "model.learning_rate": (0, None),
    "model.parameters_billion": (0, None),
    "hardware.per_device_batch_size": (1, None),
    "hardware.accumulation_steps": (1, None),
    "hardware.memory_gib": (0, None),
    "hardware.threads": (1, None),
    "hardware.vllm.gpu_memory_utilization": (0.01, 0.99),
    "hardware.vllm.tensor_parallel_size": (1, None),
    "hardware.vllm.max_model_tokens": (1, None),
}
POSITIVE = (
    "learning_rate", "model.learning_rate", "rollout.temperature", "rollout.top_p", "distillation.temperature",
    "distillation.is_clip", "distillation.pointwise_clip",
)  # fmt: skip
CHOICES: dict[str, tuple[str | None, ...]] = {
    "model.loader": ("transformers", "unsloth"),
    "model.tuning": ("lora", "full"),
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "hardware.device": ("auto", "cpu", "cuda"),
    "hardware.precision": ("auto", "bf16", "fp16", "fp32"),
    "hardware.vllm.mode": (None, "colocate", "server"),
    "distillation.signal": ("distribution", "sampled_token", "advantage"),
    "distillation.aggregation": ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"),
    "distillation.route": ("all", "failures"),
    "training.loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "training.scale_rewards": ("group", "batch", "none"),
    "training.lr_scheduler_type": (
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    ),
}  # fmt: skip
