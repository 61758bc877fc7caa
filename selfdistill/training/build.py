"""From a checked configuration to the parts of a run: model, data, rewards, teacher, trainer."""

import importlib
import inspect
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from selfdistill.config import mismatch, targets
from selfdistill.config.suggestions import closest
from selfdistill.data import load_data
from selfdistill.errors import UserError
from selfdistill.models.loading import load_model, lora_config
from selfdistill.teachers import Teacher
from selfdistill.teachers.context import Demonstration, NoContext
from selfdistill.teachers.weights import Base
from selfdistill.training.row_checks import check_rows
from selfdistill.training.trainer import Distillation, RolloutSource, SelfDistillConfig, SelfDistillTrainer

PASSED_LATER = {"tokenizer"}  # arguments that a `_target_` gets when it is built, not from the configuration
CHECKPOINTS = "checkpoints"


def check_targets(cfg: DictConfig) -> None:
    """Finds every `_target_` and binds its arguments, without calling it.

    Raises:
        UserError: the key, what is wrong with it, and the closest argument there is.
    """
    for key, node in targets(cfg):
        bind(key, node)
    known = {f.name for f in fields(SelfDistillConfig)}
    for argument in cfg.training.arguments:
        if argument not in known:
            raise UserError(
                f"training.arguments.{argument}: trl.GRPOConfig takes no such argument; {closest(str(argument), known)}"
            )


def bind(key: str, node: DictConfig) -> None:
    """Finds what a node's `_target_` names and binds its arguments."""
    _check_arguments(key, node, _find(f"{key}._target_", node["_target_"]))


def _find(key: str, name: str) -> Any:
    """What a dotted name stands for: the longest part that is a module, then attributes."""
    parts = name.split(".")
    found, missing = None, ""
    for count in range(1, len(parts) + 1):
        module = ".".join(parts[:count])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise UserError(f"{key}={name}: {module} cannot be imported: {error}.") from None
            missing = parts[count - 1]
            break
        except Exception as error:  # whatever a user's module raises
            raise UserError(f"{key}={name}: {module} cannot be imported: {type(error).__name__}: {error}") from None
    if found is None:
        raise UserError(
            f"{key}={name}: there is no module {missing} here. Is its folder on PYTHONPATH, or is it installed?"
        )
    for part in parts[count - 1 :] if missing else ():
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            raise UserError(f"{key}={name}: {getattr(found, '__name__', found)} has no {part}; {closest(part, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key}={name} is no class or function: name one that is in it.")
    return found


def _check_arguments(key: str, node: DictConfig, target: Any) -> None:
    name = node["_target_"]
    arguments = {str(k): node[k] for k in node if not str(k).startswith("_")}
    try:
        parameters = inspect.signature(target).parameters
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (TypeError, ValueError, NameError, AttributeError):
        return  # builtins without a signature, annotations that only a type checker can read
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument, value in arguments.items():
        if argument not in parameters and not open_ended:
            raise UserError(
                f"{key}.{argument}: {name} takes no such argument; {closest(argument, parameters.keys() - PASSED_LATER)}"
            )
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        if "_target_" not in (plain if isinstance(plain, dict) else ()) and (
            wanted := mismatch(plain, hints.get(argument, Any))
        ):
            raise UserError(f"{key}.{argument}={plain!r}: write {wanted}.")
    if node.get("_partial_") or "_args_" in node:
        return
    required = {
        n for n, p in parameters.items() if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    for argument in sorted(required - arguments.keys() - PASSED_LATER):
        raise UserError(f"{key}.{argument} is missing: {name} needs it; write {key}.{argument}=…")


def make(cfg: DictConfig, key: str) -> Any:
    """The group `key`, built; None where it is null.

    Raises:
        UserError: its arguments are refused.
    """
    try:
        return instantiate(cfg[key], _convert_="all")  # plain lists and dictionaries
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from error
        raise UserError(f"{key} cannot be built: {str(cause).strip().splitlines()[0]}") from error


@dataclass
class Parts:
    """A run that is ready to start."""

    cfg: DictConfig
    folder: Any
    tokenizer: Any
    data: Any
    trainer: SelfDistillTrainer
    evaluator: Any
    monitors: Any
    exporter: Any


def use_cuda(cfg: DictConfig) -> bool:
    """Whether this run is on a GPU: as configured, or as there is one.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if cfg.hardware.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "hardware.device=cuda: torch sees no GPU here. Write hardware=cpu, or hardware=auto to take what there is."
        )
    return cfg.hardware.device != "cpu" and torch.cuda.is_available()


def precision(cfg: DictConfig) -> str:
    """bf16, fp16 or fp32."""
    if cfg.hardware.precision != "auto":
        return str(cfg.hardware.precision)
    return "bf16" if use_cuda(cfg) and torch.cuda.is_bf16_supported() else "fp32"


def trainer_arguments(cfg: DictConfig, output_dir: Path) -> SelfDistillConfig:
    """TRL's arguments from our groups; `training.arguments` has the last word."""
    hardware, training, vllm = cfg.hardware, cfg.training, cfg.hardware.vllm
    kind = precision(cfg)
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": cfg.seed,
        "beta": cfg.beta,
        "num_generations": cfg.num_generations,
        "max_steps": 1 if cfg.dry_run else cfg.max_steps,
        "learning_rate": cfg.learning_rate,
        "per_device_train_batch_size": hardware.per_device_batch_size,
        "gradient_accumulation_steps": hardware.accumulation_steps,
        "gradient_checkpointing": hardware.gradient_checkpointing,
        "use_cpu": not use_cuda(cfg),
        "bf16": kind == "bf16",
        "fp16": kind == "fp16",
        "temperature": cfg.rollout.temperature,
        "top_p": cfg.rollout.top_p,
        "top_k": cfg.rollout.top_k,
        "min_p": cfg.rollout.min_p,
        "max_completion_length": cfg.rollout.max_completion_tokens,
        "chat_template_kwargs": plain(cfg.model.chat_template_kwargs) or None,
        "loss_type": training.loss_type,
        "scale_rewards": training.scale_rewards,
        "num_iterations": training.num_iterations,
        "epsilon": training.epsilon,
        "epsilon_high": training.epsilon_high,
        "mask_truncated_completions": training.mask_truncated_completions,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "logging_steps": training.logging_steps,
        "save_strategy": "steps" if training.checkpoint_every else "no",
        "save_steps": training.checkpoint_every or 500,
        "save_total_limit": training.keep_checkpoints,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": use_cuda(cfg),
        "remove_unused_columns": False,
    }
    if vllm.mode:
        arguments |= {
            "use_vllm": True,
            "vllm_mode": vllm.mode,
            "vllm_enable_sleep_mode": vllm.standby,
            "vllm_gpu_memory_utilization": vllm.gpu_memory_utilization,
            "vllm_tensor_parallel_size": vllm.tensor_parallel_size,
            "vllm_max_model_length": vllm.max_model_tokens,
        }
        if vllm.server_base_url:
            arguments["vllm_server_base_url"] = vllm.server_base_url
    arguments |= plain(training.arguments)
    try:
        return SelfDistillConfig(**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"training: trl.GRPOConfig refuses this combination: {str(error).strip().splitlines()[0]}"
        ) from error


def plain(node: DictConfig) -> dict[str, Any]:
    """A part of the configuration as a dictionary, interpolations replaced."""
    return dict(OmegaConf.to_container(node, resolve=True))  # type: ignore[arg-type]


def build(cfg: DictConfig, folder: Any) -> Parts:
    """Loads and connects everything; nothing is trained yet.

    Raises:
        UserError: a file, model or server that the configuration names cannot be used.
    """
    if cfg.hardware.vllm.standby:
        os.environ.setdefault("UNSLOTH_VLLM_STANDBY", "1")  # read when unsloth is imported
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # loading and writing a model; the run has a bar of its own
    if cfg.hardware.threads:
        torch.set_num_threads(cfg.hardware.threads)
    use_cuda(cfg)
    rewards, teacher, settings = make(cfg, "reward"), make(cfg, "teacher"), make(cfg, "eval")
    monitors, exporter = make(cfg, "monitors"), make(cfg, "export")
    model_config = plain(cfg.model)
    model, tokenizer = load_model(**model_config)
    data = load_data(
        tokenizer=tokenizer,
        **{k: v for k, v in plain(cfg.data).items() if k != "_target_"},
    )
    peft = None
    if cfg.model.tuning == "lora" and not hasattr(model, "peft_config"):
        peft = lora_config(**model_config["lora"])
    if teacher is not None and hasattr(teacher, "write"):
        teacher, data = with_server(cfg, teacher, data, model, tokenizer)
    check_rows(cfg, rewards, data.train)
    rollout = {f.name: cfg.rollout[f.name] for f in fields(RolloutSource)}
    trainer = SelfDistillTrainer(
        model=model,
        reward_funcs=rewards,
        args=trainer_arguments(cfg, folder.path / CHECKPOINTS),
        teacher=teacher,
        distillation=Distillation(**plain(cfg.distillation)) if teacher is not None else None,
        rollout=RolloutSource(**rollout),
        train_dataset=data.train,
        processing_class=tokenizer,
        peft_config=peft,
    )
    if teacher is not None and hasattr(teacher, "check_length"):
        teacher.check_length(trainer.longest_teacher_tokens())
    evaluator = None
    if settings is not None:
        judged = [
            row for row in data.eval if not needs_answer(settings.scorer) or row["answer"] or row["golden_response"]
        ]
        evaluator = settings.evaluator(
            judged,
            chat=bool(tokenizer.chat_template),
            seed=cfg.seed,
            chat_template_kwargs=model_config["chat_template_kwargs"],
        )
    return Parts(cfg, folder, tokenizer, data, trainer, evaluator, monitors, exporter)


def with_server(cfg: DictConfig, server: Any, data: Any, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """A served teacher, checked; one that writes has written the training data's demonstrations.

    What it wrote is then the context of a local teacher (SDFT), or with `rollout.on_policy_fraction=0` the target.

    Raises:
        UserError: the server cannot be used, or no demonstration was worth keeping.
    """
    for line in server.check(tokenizer, vocabulary_size=model.get_output_embeddings().weight.size(0)):
        print(line)
    if server.mode == "score":
        server.context = server.context or NoContext()
        return server, data
    rows = data.train
    columns = [{name: row[name] for name in rows.column_names if name != "prompt"} for row in rows]
    written = server.write(rows["prompt"], golden=rows["golden_response"], columns=columns)
    rows = rows.remove_columns("golden_response").add_column("golden_response", written)
    kept = rows.filter(lambda row: bool(row["golden_response"]))
    if not len(kept):
        raise UserError(
            "teacher.mode=write: none of what the server wrote was kept; lower teacher.keep_at_least or look at its answers."
        )
    print(f"the server wrote demonstrations for {len(kept)} of {len(rows)} prompts; the others are left out")
    imitates = cfg.rollout.on_policy_fraction == 0
    return None if imitates else Teacher(Base(), Demonstration()), replace(data, train=kept)


def needs_answer(scorer: Any) -> bool:
    """Whether a scorer compares with a reference: raw text has none, and is then not asked for its accuracy."""
    return hasattr(scorer, "answer_field")
