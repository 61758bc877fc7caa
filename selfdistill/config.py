"""The schema of a composed run, and every check that needs nothing heavy.

Unknown keys (also those added with `+`), types, ranges and combinations are refused here in about a second, before
torch is imported; the signatures behind `_target_`s are bound by `selfdistill.build` afterwards, before weights load.
"""

import difflib
import os
import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.errors import ConfigCompositionException, HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from selfdistill.errors import UserError

TRUSTED = ("selfdistill", "trl", "peft", "transformers", "torch")


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
    """The root. What a `_target_` builds is open here and bound against its signature later."""

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
    data: Any = None
    reward: Any = None
    teacher: Any = None
    eval: Any = None
    monitors: Any = None
    logger: Any = None
    export: Any = None
    experiment: Any = field(default=None)
    debug: Any = field(default=None)


def closest(word: str, choices: Any) -> str:
    """`; did you mean X?` or the choices."""
    choices = [str(c) for c in choices]
    match = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {match[0]}?" if match else f"known here: {', '.join(sorted(choices))}"


def _unknown_keys(node: DictConfig, schema: type, path: str) -> None:
    known = {f.name: f for f in fields(schema)}
    hints = get_type_hints(schema)
    for key in node:
        where = f"{path}{key}"
        if key not in known:
            raise UserError(f"{where} is not a key: {closest(str(key), known)}")
        if is_dataclass(hints[key]):
            child = node._get_node(key)
            if not isinstance(child, DictConfig):
                raise UserError(f"{where}={node[key]!r}: this is a group of keys, e.g. {where}.{fields(hints[key])[0].name}=…")
            _unknown_keys(child, hints[key], f"{where}.")


def _check_type(value: Any, hint: Any, where: str) -> None:
    if is_dataclass(hint):
        for f in fields(hint):
            _check_type(value.get(f.name), get_type_hints(hint)[f.name], f"{where}{f.name}.")
        return
    where = where.rstrip(".")
    choices = get_args(hint) if get_args(hint) and not getattr(hint, "__origin__", None) else (hint,)
    if hint is Any or value is None and type(None) in choices:
        return
    origin = next((getattr(c, "__origin__", c) for c in choices if c is not type(None)), Any)
    accepted: Any = {float: (int, float), list: (list,), dict: (dict,)}.get(origin, (origin,))
    if isinstance(value, bool) and bool not in accepted or not isinstance(value, accepted):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list, e.g. [a,b]",
                  dict: "keys and values, e.g. {a: 1}"}[origin]  # fmt: skip
        or_null = " or null" if type(None) in choices else ""
        raise UserError(f"{where}={value!r}: write {wanted}{or_null}.")


# key -> (lowest, highest, open ends), as shown in messages
RANGES: dict[str, tuple[float | None, float | None]] = {
    "beta": (0, None), "alpha": (0, 1), "num_generations": (1, None), "max_steps": (1, None), "learning_rate": (0, None),
    "policy_weight": (0, None), "rollout.temperature": (0, None), "rollout.top_p": (0, 1), "rollout.top_k": (0, None),
    "rollout.min_p": (0, 1), "rollout.max_completion_tokens": (1, None), "rollout.on_policy_fraction": (0, 1),
    "rollout.cross_entropy_weight": (0, None), "distillation.alpha": (0, 1), "distillation.top_k": (1, None), "distillation.is_clip": (0, None),
    "distillation.skip_tokens": (0, None), "distillation.weight": (0, None), "distillation.temperature": (0, None),
    "training.num_iterations": (1, None), "training.epsilon": (0, 1), "training.warmup_steps": (0, None),
    "training.weight_decay": (0, None), "training.max_grad_norm": (0, None), "training.logging_steps": (1, None),
    "training.checkpoint_every": (0, None), "training.keep_checkpoints": (1, None),
    "hardware.per_device_batch_size": (1, None), "hardware.accumulation_steps": (1, None), "hardware.threads": (1, None),
    "hardware.vllm.gpu_memory_utilization": (0.01, 0.99), "hardware.vllm.tensor_parallel_size": (1, None),
    "model.lora.r": (1, None), "model.lora.alpha": (1, None), "model.lora.dropout": (0, 1), "model.max_seq_tokens": (1, None),
    "seed": (0, 2**32 - 1),
}  # fmt: skip
CHOICES = {
    "model.tuning": ("lora", "full"),
    "model.loader": ("transformers", "unsloth"),
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "hardware.device": ("auto", "cpu", "cuda"),
    "hardware.precision": ("auto", "bf16", "fp16", "fp32"),
    "hardware.vllm.mode": (None, "colocate", "server"),
    "distillation.signal": ("distribution", "sampled_token", "advantage"),
    "distillation.aggregation": ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"),
    "distillation.route": ("all", "failures"),
    "training.loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "training.scale_rewards": ("group", "batch", "none"),
}
POSITIVE = ("learning_rate", "rollout.temperature", "distillation.temperature", "distillation.is_clip", "rollout.top_p")


def _check_values(cfg: DictConfig) -> None:
    for key, (low, high) in RANGES.items():
        value = OmegaConf.select(cfg, key)
        if value is None:
            continue
        below = low is not None and (value < low or (key in POSITIVE and value <= 0))
        if below or (high is not None and value > high) or value != value:
            bounds = f"between {low:g} and {high:g}" if high is not None else f"{'above' if key in POSITIVE else 'at least'} {low:g}"
            raise UserError(f"{key}={value} is out of range: write a number {bounds}.")
    for key, choices in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value not in choices:
            shown = ", ".join("null" if c is None else c for c in choices)
            raise UserError(f"{key}={value!r}: write one of {shown}.")


def _target(cfg: DictConfig, key: str) -> str:
    node = OmegaConf.select(cfg, key)
    return str(node.get("_target_", "")) if isinstance(node, DictConfig) else ""


def _check_combinations(cfg: DictConfig, overridden: set[str]) -> None:
    """What each key allows alone but together makes no sense."""
    teaches, rewarded = cfg.teacher is not None, cfg.reward is not None
    imitates = cfg.rollout.cross_entropy_weight > 0
    if not (teaches or rewarded or imitates):
        raise UserError("Nothing to learn from: choose a reward (reward=supervised), a teacher (teacher=demonstration) or both.")
    if not teaches:
        for key in sorted(overridden):
            if key == "alpha" or key.startswith("distillation."):
                raise UserError(f"{key} is set but nothing reads it: there is no teacher. Add one, e.g. teacher=demonstration.")
        if cfg.rollout.from_teacher:
            raise UserError("rollout.from_teacher=true needs a teacher, e.g. teacher=demonstration.")
    if not rewarded and cfg.distillation.route == "failures":
        raise UserError("distillation.route=failures needs a reward to tell failures by, e.g. reward=exact_match.")
    if "policy_weight" in overridden and not rewarded and cfg.policy_weight > 0:
        raise UserError("policy_weight is set but there is no reward for a policy gradient: choose one, e.g. reward=exact_match.")
    batch = cfg.hardware.per_device_batch_size * cfg.hardware.accumulation_steps * int(os.environ.get("WORLD_SIZE", 1))
    if batch % cfg.num_generations:
        fitting = [g for g in range(1, batch + 1) if batch % g == 0]
        steps = cfg.num_generations // _gcd(cfg.num_generations, cfg.hardware.per_device_batch_size)
        raise UserError(
            f"num_generations={cfg.num_generations} does not divide a batch of {batch} completions (hardware.per_device_batch_size="
            f"{cfg.hardware.per_device_batch_size} x accumulation_steps={cfg.hardware.accumulation_steps}): write num_generations="
            f"{min(fitting, key=lambda g: abs(g - cfg.num_generations))}, or hardware.accumulation_steps={steps}."
        )
    if rewarded and cfg.num_generations == 1 and cfg.policy_weight > 0:
        raise UserError("num_generations=1 leaves a policy gradient nothing to compare: write at least 2, or policy_weight=0.")
    if _target(cfg, "teacher.context").endswith(".Feedback") and not rewarded:
        raise UserError("teacher=feedback shows successes and feedback, and there is no reward to tell them: choose one, e.g. reward=exact_match.")
    if cfg.distillation.signal == "sampled_token" and cfg.alpha != 1:
        raise UserError(f"distillation.signal=sampled_token estimates KL(student || teacher): write alpha=1, not alpha={cfg.alpha}.")
    if cfg.distillation.top_k == 1 and not cfg.distillation.tail:
        raise UserError("distillation.top_k=1 with distillation.tail=false compares nothing: write tail=true or a larger top_k.")
    if cfg.model.load_in_4bit and cfg.model.tuning == "full":
        raise UserError("model.load_in_4bit=true cannot be trained in full: write model.tuning=lora.")
    if cfg.hardware.vllm.mode and cfg.hardware.device == "cpu":
        raise UserError(f"hardware.vllm.mode={cfg.hardware.vllm.mode} needs a GPU: write hardware.vllm.mode=null or choose a GPU profile.")
    if cfg.hardware.vllm.mode == "server" and not cfg.hardware.vllm.server_base_url:
        raise UserError("hardware.vllm.mode=server needs hardware.vllm.server_base_url, e.g. http://localhost:8000.")
    if cfg.hardware.vllm.mode and cfg.rollout.from_teacher:
        raise UserError("rollout.from_teacher=true samples with transformers: write hardware.vllm.mode=null.")
    if cfg.rollout.max_completion_tokens > cfg.model.max_seq_tokens:
        raise UserError(
            f"rollout.max_completion_tokens={cfg.rollout.max_completion_tokens} is above model.max_seq_tokens={cfg.model.max_seq_tokens}."
        )
    if _target(cfg, "teacher").endswith("ServerTeacher") and cfg.teacher.get("mode") != "write" and cfg.rollout.temperature != 1:
        raise UserError("A served teacher scores at temperature 1: write rollout.temperature=1.")
    if _target(cfg, "export").endswith(".Lora") and cfg.model.tuning == "full":
        raise UserError("export=lora has no adapter to export with model.tuning=full: write export=merged_16bit or model.tuning=lora.")


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def targets(node: Any, path: str = "") -> list[tuple[str, DictConfig]]:
    """Every node of the configuration that names a `_target_`, with its key, outermost first."""
    found: list[tuple[str, DictConfig]] = []
    if isinstance(node, DictConfig) and not node._is_none():
        if "_target_" in node:
            found.append((path, node))
        for key in node:
            found += targets(node._get_node(key), f"{path}.{key}" if path else str(key))
    elif isinstance(node, ListConfig) and not node._is_none():
        for i in range(len(node)):
            found += targets(node._get_node(i), f"{path}[{i}]")
    return found


def check(cfg: DictConfig, overrides: list[str] | None = None) -> None:
    """Raises UserError at the first thing in the composed configuration that cannot be meant.

    Args:
        cfg: as Hydra composed it.
        overrides: the command line's, so that a knob that was set but that nothing reads is noticed.
    """
    _unknown_keys(cfg, Run, "")
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise UserError(f"{key} is missing: write {key}=… on the command line.") from None
    except InterpolationKeyError as error:
        raise UserError(f"{error.full_key}: it refers to a key that does not exist ({error.msg}).") from None
    for f in fields(Run):
        _check_type(plain.get(f.name), get_type_hints(Run)[f.name], f"{f.name}.")
    for key, node in targets(cfg):
        target = node["_target_"]
        if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_][\w]*(\.[A-Za-z_]\w*)+", target):
            raise UserError(f"{key}._target_={target!r}: write a dotted path to a class or function, e.g. my_package.my_module.MyReward.")
        trusted = (*TRUSTED, *cfg.trusted_prefixes)
        if target.split(".")[0] not in trusted and not any(target.startswith(p.rstrip(".") + ".") for p in trusted):
            raise UserError(f"{key}._target_={target}: only {', '.join(trusted)} are trusted. To allow it: trusted_prefixes=[{target.split('.')[0]}].")
    _check_values(cfg)
    _check_combinations(cfg, {o.lstrip("+~").split("=")[0] for o in overrides or []})


def run_name(cfg: DictConfig, choices: Any = None) -> str:
    """What a run is called: its own name, the experiment, or the reward and teacher it is made of."""
    if cfg.name:
        return str(cfg.name)
    chosen = {key: value for key, value in dict(choices or {}).items() if value not in (None, "null", "none")}
    return str(chosen.get("experiment") or "-".join(str(chosen[k]) for k in ("reward", "teacher") if k in chosen) or "run")


def explain(error: Exception, overrides: list[str]) -> str:
    """Hydra's and OmegaConf's errors as one message that names the key and the closest match."""
    cause: BaseException = error
    while isinstance(cause.__cause__, OmegaConfBaseException):
        cause = cause.__cause__
    text = str(error)
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        options = re.findall(r"^\t(\S+)$", text, flags=re.M)
        return f"{match[1]}={match[2]}: there is no such choice; {closest(match[2], options)}"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        if isinstance(cause, ConfigKeyError) and cause.parent_node is not None and isinstance(cause.parent_node, DictConfig):
            return f"{key} is not a key: {closest(str(cause.key), [str(k) for k in cause.parent_node])}"
        root = [f.name for f in fields(Run)]
        return f"{key} is not a key: {closest(key.split('.')[0], root)}"
    if isinstance(error, (ConfigCompositionException, HydraException, OmegaConfBaseException)):
        full = getattr(cause, "full_key", None) or getattr(error, "full_key", None)
        first = text.strip().splitlines()[0]
        return f"{full}: {first}" if full else first
    return text


class CheckSweep(Callback):
    """Composes and checks every job of a sweep before the first one starts, so that a bad one stops it at once."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from hydra import compose
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.override_parser.overrides_parser import OverridesParser

        if not str(config.hydra.sweeper._target_).endswith("BasicSweeper"):
            return  # an adaptive sweeper decides as it goes; each of its jobs is checked when it starts
        try:
            parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
            for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
                for job in batch:
                    cfg = compose(config.hydra.job.config_name, list(job))
                    check(cfg, list(job))
        except (UserError, HydraException, OmegaConfBaseException) as error:
            # an ordinary exception would be turned into a warning by Hydra
            raise SystemExit(fail(explain(error, []) if not isinstance(error, UserError) else str(error))) from None


def fail(message: str) -> int:
    """Prints the message for the person who made the mistake and gives the exit code."""
    import sys

    print(f"selfdistill: {message}", file=sys.stderr)
    return 2
