"""Every check of a composed configuration that needs nothing heavy: keys, types, ranges, choices and combinations."""

import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from math import gcd
from os import environ
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from selfdistill.config.messages import WITHOUT, explain
from selfdistill.config.schema import CHOICES, POSITIVE, RANGES, Run
from selfdistill.config.suggestions import closest
from selfdistill.errors import UserError

TRUSTED = ("selfdistill", "trl", "peft", "transformers", "torch")
WRITE = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list, e.g. [a,b]",
         dict: "keys and values, e.g. {a: 1}"}  # fmt: skip


def check(cfg: DictConfig, overrides: Iterable[str] = ()) -> None:
    """Raises UserError at the first thing in the composed configuration that cannot be meant.

    Args:
        cfg: as Hydra composed it.
        overrides: the command line's, so that a knob that was set but that nothing reads is noticed.
    """
    _check_keys(cfg, Run, "")
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is missing: write {error.full_key}=… on the command line.") from None
    except InterpolationKeyError as error:
        raise UserError(
            f"{error.full_key} refers to a key that does not exist: {str(error).splitlines()[0]}."
        ) from None
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None
    _check_types(plain, Run, "")
    for key, node in targets(cfg):
        check_trust(key, node["_target_"], cfg.trusted_prefixes)
    _check_values(cfg)
    _check_read(cfg, {override.lstrip("+~").split("=")[0] for override in overrides})
    _check_signal(cfg)
    _check_batch(cfg)
    _check_distillation(cfg)
    _check_machine(cfg)


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


def mismatch(value: Any, hint: Any) -> str | None:
    """What to write instead of a value that its annotation does not take; None where it fits.

    Judges numbers, truth values, texts, lists, mappings and literals; any other annotation takes everything.
    """
    union = get_origin(hint) in (typing.Union, types.UnionType)
    options = get_args(hint) if union else (hint,)
    wanted: list[str] = []
    for option in options:
        kind = get_origin(option) or option
        if option is type(None) or option is None:
            fits, write = value is None, "null"
        elif kind is typing.Literal:
            fits, write = value in get_args(option), " or ".join(map(str, get_args(option)))
        elif kind in WRITE:
            fits, write = _fits(value, kind, get_args(option)), WRITE[kind]
            if kind is list and get_args(option) == (str,):
                write = "a list of texts"
            if kind is str and isinstance(value, bool | int | float):
                write = f"text, in quotes: '\"{value}\"'"
        else:
            return None
        if fits:
            return None
        wanted.append(write)
    return " or ".join(wanted)


def _fits(value: Any, kind: Any, arguments: tuple[Any, ...]) -> bool:
    if kind is list:
        return isinstance(value, list) and not any(arguments and mismatch(item, arguments[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _check_keys(node: DictConfig, schema: type, path: str) -> None:
    known = {f.name for f in fields(schema)}
    hints = get_type_hints(schema)
    for key in node:
        if key not in known:
            raise UserError(f"{path}{key} is not a key: {closest(str(key), known)}")
    for name in known:
        where, child = f"{path}{name}", node._get_node(name) if name in node.keys() else None  # noqa: SIM118 - without resolving
        if child is None:
            instead = f"; to do without write {name}={WITHOUT[name]}" if name in WITHOUT and not path else ""
            raise UserError(f"{where} was removed, but a run needs it{instead}.")
        if is_dataclass(hints[name]):
            if not isinstance(child, DictConfig) or child._is_none():
                first = fields(hints[name])[0].name
                raise UserError(
                    f"{where} is a group of keys and cannot be one value: write {where}.{first}=… and so on."
                )
            _check_keys(child, hints[name], f"{where}.")


def _check_types(values: Any, schema: Any, path: str) -> None:
    hints = get_type_hints(schema)
    for name, hint in hints.items():
        where, value = f"{path}{name}", values[name]
        if is_dataclass(hint):
            _check_types(value, hint, f"{where}.")
        elif hint is Any and not path:
            if value is not None and not (isinstance(value, dict) and "_target_" in value):
                raise UserError(
                    f"{where} has no _target_, so nothing can be built from it: choose one of its options, e.g. {where}=NAME."
                )
        elif wanted := mismatch(value, hint):
            raise UserError(f"{where}={value!r}: write {wanted}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}={value}: write a finite number.")


def check_trust(key: str, target: Any, prefixes: Iterable[str]) -> None:
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        raise UserError(
            f"{key}._target_={target!r}: write a dotted path to a class or function, e.g. my_module.MyReward."
        )
    trusted = (*TRUSTED, *prefixes)
    if not any(target.startswith(f"{prefix.rstrip('.')}.") for prefix in trusted):
        raise UserError(
            f"{key}._target_={target}: only {', '.join(trusted)} are trusted. To allow it: "
            f"trusted_prefixes=[{target.split('.')[0]}]."
        )


def _check_values(cfg: DictConfig) -> None:
    for key, (low, high) in RANGES.items():
        value = OmegaConf.select(cfg, key)
        if value is None:
            continue
        excluded = key in POSITIVE
        if value < low or (excluded and value == low) or (high is not None and value > high):
            lower = f"above {low}" if excluded else f"at least {low}"
            bounds = lower if high is None else f"{lower} and at most {high}"
            raise UserError(f"{key}={value} is out of range: write a number {bounds}.")
    for key, choices in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value not in choices:
            shown = ", ".join("null" if choice is None else choice for choice in choices)
            raise UserError(f"{key}={value}: write one of {shown}.")


def _check_read(cfg: DictConfig, overridden: set[str]) -> None:
    """A knob that was turned and that nothing in the composition reads: a sweep over it would compare equal runs."""
    d, vllm = cfg.distillation, cfg.hardware.vllm
    divergence = (
        "distillation.top_k",
        "distillation.tail",
        "distillation.pointwise_clip",
        "distillation.jsd_normalize",
    )
    with_alpha = ("alpha", "distillation.alpha", *divergence)
    rules: tuple[tuple[bool, tuple[str, ...], str], ...] = (
        (cfg.teacher is None, ("alpha", "distillation"), "there is no teacher. Add one, e.g. teacher=demonstration"),
        (
            cfg.teacher is None,
            ("policy_weight",),
            "without a teacher there is nothing to weigh the policy gradient against",
        ),
        (
            cfg.reward is None,
            ("policy_weight", "training.scale_rewards"),
            "there is no reward. Choose one, e.g. reward=exact_match",
        ),
        (d.weight == 0, with_alpha, "distillation.weight is 0"),
        (d.signal == "advantage", with_alpha, "distillation.signal=advantage compares the sampled tokens alone"),
        (
            d.signal == "sampled_token",
            divergence,
            "distillation.signal=sampled_token compares the sampled tokens alone",
        ),
        (
            d.top_k is None and not served(cfg),
            ("distillation.tail",),
            "it belongs to distillation.top_k, which is null",
        ),
        (
            d.route == "all" and not _context_follows(cfg, "success_threshold"),
            ("distillation.success_threshold",),
            "it belongs to distillation.route=failures and teacher/context=feedback",
        ),
        (cfg.rollout.on_policy_fraction == 1, ("rollout.demonstration_field",), "rollout.on_policy_fraction is 1"),
        (cfg.model.tuning == "full", ("model.lora",), "model.tuning=full has no adapter. Write model.tuning=lora"),
        (
            vllm.mode is None,
            tuple(f"hardware.vllm.{key}" for key in vllm if key != "mode"),
            "hardware.vllm.mode is null",
        ),
    )
    for unread, keys, reason in rules:
        for key in sorted(overridden) if unread else ():
            if key in keys or key.startswith(tuple(f"{k}." for k in keys)):
                raise UserError(f"{key} is set but nothing reads it: {reason}.")


def _check_signal(cfg: DictConfig) -> None:
    """Something to learn from, and what each source of signal needs beside it."""
    teaches, rewarded, rollout = cfg.teacher is not None, cfg.reward is not None, cfg.rollout
    if not (teaches or rewarded or rollout.cross_entropy_weight > 0):
        raise UserError(
            "Nothing to learn from: choose a reward (reward=supervised), a teacher (teacher=demonstration) or both."
        )
    if rollout.cross_entropy_weight > 0 and rollout.on_policy_fraction == 1:
        raise UserError(
            "rollout.cross_entropy_weight counts for demonstrations alone, and rollout.on_policy_fraction=1 takes none: "
            "write rollout.on_policy_fraction=0 to train on demonstrations."
        )
    if rollout.from_teacher and not teaches:
        raise UserError("rollout.from_teacher=true needs a teacher, e.g. teacher=demonstration.")
    if cfg.distillation.route == "failures" and not rewarded:
        raise UserError("distillation.route=failures needs a reward to tell failures by, e.g. reward=exact_match.")
    if _target(cfg, "teacher.context").endswith(".Feedback") and not rewarded:
        raise UserError(
            f"{_target(cfg, 'teacher.context')} shows successes and feedback, and there is no reward to tell them: "
            "choose one, e.g. reward=exact_match."
        )
    if teaches and cfg.distillation.weight == 0 and not (rewarded and cfg.distillation.policy_weight > 0):
        raise UserError(
            "distillation.weight=0 leaves nothing to learn: write distillation.weight=1, or a reward and policy_weight=1."
        )


def _check_batch(cfg: DictConfig) -> None:
    generations, hardware = cfg.num_generations, cfg.hardware
    processes = int(environ.get("WORLD_SIZE", 1))
    batch = hardware.per_device_batch_size * hardware.accumulation_steps * processes
    if batch % generations:
        fitting = [g for g in range(1, batch + 1) if batch % g == 0]
        each = hardware.per_device_batch_size * processes
        raise UserError(
            f"num_generations={generations} does not divide a batch of {batch} completions (hardware.per_device_batch_size="
            f"{hardware.per_device_batch_size} x hardware.accumulation_steps={hardware.accumulation_steps}"
            f"{f' x {processes} processes' if processes > 1 else ''}): write num_generations="
            f"{min(fitting, key=lambda g: abs(g - generations))}, or hardware.accumulation_steps={generations // gcd(generations, each)}."
        )
    if cfg.reward is not None and generations == 1 and (cfg.teacher is None or cfg.distillation.policy_weight > 0):
        without = "." if cfg.teacher is None else ", or policy_weight=0."
        raise UserError(f"num_generations=1 leaves a policy gradient nothing to compare: write at least 2{without}")
    if cfg.rollout.max_completion_tokens > cfg.model.max_seq_tokens:
        raise UserError(
            f"rollout.max_completion_tokens={cfg.rollout.max_completion_tokens} is above "
            f"model.max_seq_tokens={cfg.model.max_seq_tokens}: a completion cannot be longer than the whole sequence."
        )


def _check_distillation(cfg: DictConfig) -> None:
    d = cfg.distillation
    if d.signal == "sampled_token" and d.alpha != 1:
        raise UserError(
            f"distillation.signal=sampled_token estimates KL(student || teacher): write alpha=1, not alpha={d.alpha}."
        )
    if d.top_k == 1 and not d.tail:
        raise UserError(
            "distillation.top_k=1 with distillation.tail=false compares nothing: write tail=true or a larger top_k."
        )
    if served(cfg) and cfg.teacher.get("mode") != "write" and cfg.rollout.temperature != 1:
        raise UserError(
            f"rollout.temperature={cfg.rollout.temperature}: a served teacher scores at temperature 1; write rollout.temperature=1."
        )


def _check_machine(cfg: DictConfig) -> None:
    model, vllm = cfg.model, cfg.hardware.vllm
    if model.load_in_4bit and model.tuning == "full":
        raise UserError("model.load_in_4bit=true cannot be trained in full: write model.tuning=lora.")
    if model.adapter_path and model.tuning == "full":
        raise UserError(
            "model.adapter_path names an adapter, and model.tuning=full trains none: write model.tuning=lora."
        )
    if vllm.mode and cfg.hardware.device == "cpu":
        raise UserError(
            f"hardware.vllm.mode={vllm.mode} needs a GPU: write hardware.vllm.mode=null, or choose a GPU, e.g. hardware=gpu_24gb."
        )
    if vllm.mode == "server" and not vllm.server_base_url:
        raise UserError("hardware.vllm.mode=server needs hardware.vllm.server_base_url, e.g. http://localhost:8000.")
    if vllm.mode and cfg.rollout.from_teacher:
        raise UserError(
            f"rollout.from_teacher=true samples with transformers, not with hardware.vllm.mode={vllm.mode}: write hardware.vllm.mode=null."
        )
    if _target(cfg, "export").endswith(".Lora") and model.tuning == "full":
        raise UserError(
            "export=lora has no adapter to export with model.tuning=full: write export=merged_16bit or model.tuning=lora."
        )


def _context_follows(cfg: DictConfig, key: str) -> bool:
    """Whether the teacher's context takes this value from elsewhere in the configuration."""
    context = OmegaConf.select(cfg, "teacher.context")
    return isinstance(context, DictConfig) and key in context and OmegaConf.is_interpolation(context, key)


def served(cfg: DictConfig) -> bool:
    """Whether the teacher is behind a server."""
    return _target(cfg, "teacher").endswith(".ServerTeacher")


def _target(cfg: DictConfig, key: str) -> str:
    node = OmegaConf.select(cfg, key)
    return str(node.get("_target_", "")) if isinstance(node, DictConfig) else ""
