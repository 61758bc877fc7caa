"""The typed run: its keys, their types, ranges and choices. Groups with a `_target_` are open; their target decides."""

from dataclasses import dataclass, field
from typing import Any

from selfdistill.config.settings import Distillation, RolloutSource
from selfdistill.limits import number, one_of

Target = dict[str, Any]  # `_target_` and the arguments that it is called with


@dataclass(frozen=True)
class Adapter:
    r: int = field(metadata=number(1, 4096))
    alpha: int = field(metadata=number(1))
    dropout: float = field(metadata=number(0, 1))
    target_modules: Any


@dataclass(frozen=True)
class Rates:
    lora: float = field(metadata=number(above=0))
    full: float = field(metadata=number(above=0))


@dataclass(frozen=True)
class Student:
    name: str
    loader: str = field(metadata=one_of("transformers", "unsloth"))
    tuning: str = field(metadata=one_of("lora", "full"))
    lora: Adapter
    dtype: str = field(metadata=one_of("auto", "float32", "bfloat16", "float16"))
    load_in_4bit: bool
    attn_implementation: str | None
    revision: str | None
    trust_remote_code: bool
    local_files_only: bool
    adapter_path: str | None
    max_seq_tokens: int = field(metadata=number(1))
    max_prompt_tokens: int | None = field(metadata=number(1))
    max_completion_tokens: int = field(metadata=number(1))
    rates: Rates
    chat_template_kwargs: dict[str, Any]
    retention_path: str | None
    parameters_billion: float | None = field(metadata=number(0))


@dataclass(frozen=True)
class Vllm:
    mode: str | None = field(metadata=one_of(None, "colocate", "server"))
    gpu_memory_utilization: float = field(metadata=number(0.01, 0.99))
    standby: bool
    server_base_url: str | None
    tensor_parallel_size: int = field(metadata=number(1))
    max_model_tokens: int = field(metadata=number(1))


@dataclass(frozen=True)
class Hardware:
    device: str = field(metadata=one_of("auto", "cpu", "cuda"))
    precision: str = field(metadata=one_of("auto", "bf16", "fp16", "fp32"))
    per_device_batch_size: int = field(metadata=number(1))
    accumulation_steps: int | None = field(metadata=number(1))
    gradient_checkpointing: bool
    memory_gib: float | None = field(metadata=number(0))
    threads: int | None = field(metadata=number(1, 1024))
    vllm: Vllm


@dataclass(frozen=True, kw_only=True)
class Rollout(RolloutSource):
    temperature: float = field(metadata=number(above=0))
    top_p: float = field(metadata=number(above=0, high=1))
    top_k: int = field(metadata=number(0))
    min_p: float | None = field(metadata=number(0, 1))
    max_completion_tokens: int = field(metadata=number(1))


@dataclass(frozen=True)
class Training:
    loss_type: str = field(
        metadata=one_of("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    )
    scale_rewards: str = field(metadata=one_of("group", "batch", "none"))
    num_iterations: int = field(metadata=number(1))
    epsilon: float = field(metadata=number(0, 1))
    epsilon_high: float | None = field(metadata=number(0))
    mask_truncated_completions: bool
    lr_scheduler_type: str = field(
        metadata=one_of(
            "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
        ),
    )
    warmup_steps: int = field(metadata=number(0))
    weight_decay: float = field(metadata=number(0))
    max_grad_norm: float = field(metadata=number(0))
    logging_steps: int = field(metadata=number(1))
    checkpoint_every: int = field(metadata=number(0))
    keep_checkpoints: int = field(metadata=number(1))
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Show:
    table_rows: int = field(metadata=number(1))
    completions_every: int = field(metadata=number(0))
    completions_kept: int = field(metadata=number(0))
    completions_printed: int = field(metadata=number(0))


@dataclass(frozen=True)
class Run:
    """The root of a configuration that has passed every check (`selfdistill.config.check` gives it)."""

    seed: int = field(metadata=number(0, 2**32 - 1))
    beta: float = field(metadata=number(0))
    alpha: float
    num_generations: int = field(metadata=number(1))
    completions_per_step: int = field(metadata=number(1))
    max_steps: int | None = field(metadata=number(1))
    epochs: float | None = field(metadata=number(above=0))
    budget_s: float | None = field(metadata=number(above=0))
    budget_tokens: int | None = field(metadata=number(1))
    rates: Rates
    learning_rate: float = field(metadata=number(above=0))
    objective: str
    keep_best: str | None
    policy_weight: float
    name: str | None
    group: str | None
    tags: list[str]
    output_dir: str
    resume: str | None
    resume_sweep: str | None
    repeat: str | None
    check: bool
    dry_run: bool
    allow_code_execution: bool | str
    trusted_prefixes: list[str]
    rollout: Rollout
    distillation: Distillation
    show: Show
    training: Training
    model: Student
    hardware: Hardware
    data: Target
    tasks: dict[str, Any]
    probes: dict[str, Any]
    reward: Target | None
    teacher: Target | None
    eval: Target | None
    monitors: Target | None
    logger: Target | None
    export: Target | None

    @property
    def sources(self) -> dict[str, Target]:
        """Every data set that is read, by its key: `data`, or the `tasks` of a sequence in its place, and `probes`."""
        trained = {f"tasks.{name}": node for name, node in self.tasks.items()} or {"data": self.data}
        return trained | {f"probes.{name}": node for name, node in self.probes.items()}
