"""How much memory a run will need, before anything is loaded."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from selfdistill.config.batch import batch_of
from selfdistill.config.schema import Run, Student
from selfdistill.config.targets import declares
from selfdistill.errors import UserError
from selfdistill.machine.memory import CACHE_ON_CPU, CACHE_ON_CPU_GIB, machine_memory_gib
from selfdistill.models.location import parameters

if TYPE_CHECKING:
    from selfdistill.machine.simulated_passes import Passes, Recipe

log = logging.getLogger(__name__)

GIB = 2**30
FLOAT32 = 4  # bytes
# Trained parameters per parameter of the model and unit of rank, with an adapter on every linear layer: between the
# 0.001 of a model of 0.6 billion and the 0.0003 of one of 7 billion. Only for models whose config.json is not here.
ADAPTER_SHARE = 0.0006
# Python with torch, transformers and TRL on a CPU; a CUDA context with its libraries on a GPU.
PROGRAM_CPU_GIB, PROGRAM_GPU_GIB = 0.65, 0.5
# How far an estimate may be off: a run is refused where even one that is too high by this share would not fit.
ERROR = 0.15
# A shorter completion is not proposed.
LEAST_COMPLETION_TOKENS = 64
# Beyond completion and prompt, of a teacher that is shown a solution and feedback.
WORDING_TOKENS = 64


@dataclass(frozen=True)
class Lengths:
    """The most tokens of a prompt, of what the teacher sees before a completion, and of a completion."""

    prompt: int
    teacher_prompt: int
    completion: int


@dataclass(frozen=True)
class Forecast:
    """The memory of a run, in GiB.

    Attributes:
        kept: what stays, by part.
        phases: what each phase of a step takes beside it, at the most; empty where the model's config.json is not here,
            or its architecture cannot be tried without numbers.
        limit: what there is.
        whose: whose memory that is, for a message.
    """

    kept: Mapping[str, float]
    phases: Mapping[str, float] = field(default_factory=dict)
    limit: float | None = None
    whose: str = ""

    @property
    def total(self) -> float:
        """The most at any time."""
        return sum(self.kept.values()) + max(self.phases.values(), default=0.0)

    @property
    def cannot_fit(self) -> bool:
        return self.limit is not None and self.total > self.limit * (1 + ERROR)


# ---- from the configuration alone ----


def estimate(run: Run | DictConfig, trained: int | None = None) -> dict[str, float]:
    """GiB by part, from the configuration alone: weights, gradients and optimizer, reference and teacher copies.

    Activations are left out; `forecast` has them. Empty when the model's size is unknown
    (`model.parameters_billion`).

    Args:
        run: a run, or a composed configuration that was not checked.
        trained: parameters that are trained, where that is known exactly.
    """
    model = run.model
    if not model.parameters_billion:
        return {}
    count = model.parameters_billion * 1e9
    full = model.tuning == "full"
    if trained is None:
        trained = int(count if full else count * ADAPTER_SHARE * model.lora.r)
    trained_bytes = trained * (_bytes_each(model) if full else 4)  # an adapter is float32, also on a quantised model
    weights = count * _bytes_each(model) + (0 if full else trained_bytes)
    kept = _kept(run, weights, trained, trained_bytes)
    return {"gradients": trained_bytes / GIB, **kept}


def _kept(run: Run | DictConfig, weights: float, trained: int, trained_bytes: float) -> dict[str, float]:
    """GiB of what stays: weights in bytes, parameters that are trained, and their bytes."""
    model, vllm, teacher = run.model, run.hardware.vllm, (run.teacher or {}).get("weights")
    optimizer = str(run.training.arguments.get("optim", "adamw"))
    states = 0.0 if optimizer == "sgd" else 2 * trained if "8bit" in optimizer else 2 * trained_bytes
    parts = {"weights": weights, "optimizer": states}
    if model.tuning == "full" and run.beta:
        parts["reference"] = weights
    if run.teacher is not None and declares("teacher.weights", teacher, "keeps_copy"):
        parts["teacher's copy"] = trained * 4 if declares("teacher.weights", teacher, "dtype") else trained_bytes
    if other := _other_model(run):
        parts["teacher's model"] = other
    gib = {name: size / GIB for name, size in parts.items() if size}
    if not vllm.standby and (reserved := _vllm_gib(run, weights)):
        gib["vLLM"] = reserved
    return gib


def _vllm_gib(run: Run | DictConfig, weights: float) -> float:
    """What vLLM reserves for its weights and its KV cache: a share of the GPU; on a CPU as much as they take."""
    hardware = run.hardware
    if hardware.vllm.mode != "colocate":
        return 0.0
    card = machine_memory_gib(gpu=True)
    if hardware.device == "cpu" or (hardware.device == "auto" and card is None):
        return weights / GIB + float(os.environ.get(CACHE_ON_CPU) or CACHE_ON_CPU_GIB)
    return float((hardware.memory_gib or card or 0.0) * hardware.vllm.gpu_memory_utilization)


def _other_model(run: Run | DictConfig) -> float:
    """Bytes of a teacher of its own, from its files."""
    weights = (run.teacher or {}).get("weights") or {}
    name = weights.get("name")
    counted = parameters(name) if isinstance(name, str) else None
    return (counted or 0) * (4 if weights.get("dtype") == "float32" else 2)


def _bytes_each(model: Student | DictConfig) -> float:
    """Memory of one weight of the model without its adapter."""
    if model.load_in_4bit:
        return 0.55  # four bits and the scales of their blocks
    in_float32 = model.dtype == "float32" or (model.tuning == "full" and model.dtype == "auto")
    return 4 if in_float32 else 2


# ---- from the model's config.json ----


def forecast(run: Run, lengths: Lengths, *, on_gpu: bool) -> Forecast:
    """The memory of a run with its activations, from the model's config.json; without it, what `estimate` says.

    Args:
        lengths: of the data at hand.
        on_gpu: whether the run is going to be on a GPU.
    """
    limit, whose = memory_limit(run, on_gpu)
    try:
        passes = _passes_of(run, on_gpu)
    except Exception as error:  # whatever an architecture raises that cannot be built without numbers
        log.debug("no model without numbers: %s", error)
        passes = None
    if passes is None:
        return Forecast(estimate(run), {}, limit, whose)
    whole = passes.whole
    kept = {"program": PROGRAM_GPU_GIB if on_gpu else PROGRAM_CPU_GIB}
    kept |= _kept(run, whole.weight_bytes, whole.trained, whole.trained_bytes)
    try:
        phases = {name: size / GIB for name, size in _phases(run, lengths, passes, on_gpu)}
    except Exception as error:  # whatever an architecture raises that wants to see a number
        log.debug("no pass without numbers: %s", error)
        return Forecast(kept | {"gradients": whole.trained_bytes / GIB}, {}, limit, whose)
    return Forecast(kept, phases, limit, whose)


def _phases(run: Run, lengths: Lengths, passes: "Passes", on_gpu: bool) -> Iterator[tuple[str, float]]:
    """Bytes beside what stays, of each phase of a step."""
    batch, whole = batch_of(run), passes.whole
    gradients, several = whole.trained_bytes, batch.accumulation_steps > 1
    rows, length = batch.per_device, lengths.prompt + lengths.completion
    vllm, weights = run.hardware.vllm, (run.teacher or {}).get("weights") or {}
    if vllm.mode == "colocate" and vllm.standby:
        yield "writing completions", _vllm_gib(run, whole.weight_bytes) * GIB
    elif not vllm.mode and run.rollout.on_policy_fraction > 0:
        together = rows * batch.accumulation_steps
        yield "writing completions", passes.writing(together, lengths.prompt, lengths.completion)
    asked = (_passes_of(_of_teacher(run, weights), on_gpu) if "name" in weights else None) or passes
    if run.teacher is not None and not declares("teacher", run.teacher, "served"):
        read = asked.reading(rows, lengths.teacher_prompt + lengths.completion)
        yield "asking the teacher", read + (gradients if several else 0)
    scores = bool(run.beta or (run.reward is not None and run.policy_weight) or run.distillation.signal == "advantage")
    found = passes.learning(rows, length, scores=scores, beside=several)
    most = float(found.most)
    if run.teacher is not None or run.rollout.cross_entropy_weight:
        vocabulary, hidden = whole.head.shape
        # Both sides' hidden states of all tokens, and the gradient of the student's.
        tokens = rows * lengths.completion
        said = tokens * (2 * hidden + asked.whole.head.shape[1]) * FLOAT32
        # The gradient of the head is made in the forward pass, beside everything that is held for the backward pass.
        of_head = vocabulary * hidden * FLOAT32 if whole.head.requires_grad else 0
        most = max(most + said, found.held + said + _chunk_bytes(tokens, vocabulary, on_gpu) + of_head)
    yield "learning", most + (gradients if several else 0)
    yield "updating the weights", gradients
    if run.eval is not None and "batch_size" in run.eval:
        answer = min(run.eval["max_new_tokens"], lengths.completion)
        at_once = min(run.eval["batch_size"], run.eval["max_rows"])
        yield "evaluating", passes.writing(at_once, lengths.prompt, answer)


def _chunk_bytes(tokens: int, vocabulary: int, on_gpu: bool) -> int:
    """The logits of some tokens, of student and teacher, and what the loss makes of a block of them."""
    from selfdistill.losses import chunks

    chunk = chunks.CHUNK_ELEMENTS_GPU if on_gpu else chunks.CHUNK_ELEMENTS_CPU
    block = chunks.BLOCK_ELEMENTS_GPU if on_gpu else chunks.BLOCK_ELEMENTS_CPU
    at_once, of_block = (min(tokens, max(1, elements // vocabulary)) for elements in (chunk, block))
    return FLOAT32 * vocabulary * (2 * at_once + 3 * of_block)


@dataclass(frozen=True)
class _Key:
    """A recipe with what makes it equal to another one."""

    name: str
    recipe: "Recipe" = field(compare=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._what() == other._what()

    def __hash__(self) -> int:
        return hash(self._what())

    def _what(self) -> tuple[Any, ...]:
        recipe = self.recipe
        kind = (recipe.dtype, recipe.autocast, recipe.load_in_4bit, recipe.gradient_checkpointing)
        return (self.name, recipe.config.to_json_string(), *kind, str(recipe.adapter))


def _passes_of(run: Run, on_gpu: bool) -> "Passes | None":
    """Of the student; None where its config.json is not on this machine."""
    recipe = _recipe(run, on_gpu)
    return None if recipe is None else _passes(_Key(run.model.name, recipe))


def _of_teacher(run: Run, weights: Mapping[str, Any]) -> Run:
    """The run as if its student were the model that teaches it."""
    other = {"name": weights["name"], "revision": weights.get("revision"), "dtype": weights.get("dtype", "auto")}
    return replace(run, model=replace(run.model, tuning="full", load_in_4bit=False, **other))


@lru_cache(maxsize=8)
def _passes(key: _Key) -> "Passes":
    from selfdistill.machine.simulated_passes import Passes

    return Passes(key.recipe)


def _recipe(run: Run, on_gpu: bool) -> "Recipe | None":
    """How the student is loaded; None where its config.json is not on this machine."""
    import torch
    from transformers import AutoConfig

    from selfdistill.machine.simulated_passes import Recipe
    from selfdistill.models.loading import lora_config, resolve

    model = run.model
    try:
        config: Any = AutoConfig.from_pretrained(
            resolve(model.name), local_files_only=True, trust_remote_code=model.trust_remote_code,
            revision=model.revision,
        )  # fmt: skip
    except (OSError, ValueError):
        return None
    own = getattr(config, "dtype", None) or torch.float32
    dtype = (torch.float32 if model.tuning == "full" else own) if model.dtype == "auto" else getattr(torch, model.dtype)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.hardware.precision)
    if run.hardware.precision == "auto" and on_gpu:
        kind = torch.bfloat16
    adapter = None
    if model.tuning == "lora":
        lora = model.lora
        adapter = lora_config(r=lora.r, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.target_modules)
    return Recipe(config, dtype, kind, model.load_in_4bit, adapter, run.hardware.gradient_checkpointing)


def memory_limit(run: Run, on_gpu: bool) -> tuple[float | None, str]:
    """GiB that there are, and whose."""
    if run.hardware.memory_gib:
        return run.hardware.memory_gib, "hardware.memory_gib"
    found = machine_memory_gib(on_gpu)
    return found, "the GPU's memory" if on_gpu else "this machine's memory"


# ---- what to do about it ----


@dataclass(frozen=True)
class _Changed:
    """A run with one key changed, as it is written."""

    written: str
    run: Run
    lengths: Lengths


def check_fits(run: Run, lengths: Lengths, found: Forecast, *, on_gpu: bool) -> None:
    """Refuses a run that cannot fit, and says which key with which value would make it fit.

    Several processes may share a machine, or shard a model; what each of them needs is not known here.

    Raises:
        UserError: it needs more than there is, also if the estimate is too high by its usual error.
    """
    if not found.cannot_fit or batch_of(run).processes > 1:
        return
    assert found.limit is not None

    def total(changed: _Changed) -> float:
        try:
            return forecast(changed.run, changed.lengths, on_gpu=on_gpu).total
        except UserError:  # such as completions that cannot be divided so
            return float("inf")

    parts = sorted({**found.kept, **found.phases}.items(), key=lambda part: -part[1])[:3]
    largest = ", ".join(f"{name} {size:.1f}" for name, size in parts)
    says = (
        f"This run needs about {found.total:.1f} GiB at its peak (the largest parts, in GiB: {largest}), and "
        f"{found.whose} is {found.limit:.1f} GiB."
    )
    insist = "If you know better, write hardware.memory_gib= with what there is."
    alone = [next((c for c in key if total(c) <= found.limit), None) for key in _knobs(run, lengths, on_gpu)]
    if fitting := [c for c in alone if c is not None]:
        written = ", or ".join(f"{c.written} ({total(c):.1f} GiB)" for c in fitting)
        raise UserError(f"{says} Write {written}. {insist}")
    now, taken = _Changed("", run, lengths), []
    for number in range(len(alone)):
        now = list(_knobs(now.run, now.lengths, on_gpu, every=True))[number][-1]
        taken.append(now.written)
        if now.run != run and total(now) <= found.limit:
            raise UserError(f"{says} Write {' '.join(filter(None, taken))} ({total(now):.1f} GiB). {insist}")
    raise UserError(
        f"{says} With {' '.join(filter(None, taken))} it would still be {total(now):.1f} GiB: take a smaller model, or "
        f"model.load_in_4bit=true on a GPU. {insist}"
    )


def _knobs(run: Run, lengths: Lengths, on_gpu: bool, every: bool = False) -> Iterator[list[_Changed]]:
    """For each key that saves memory, its values from the mildest to the strongest; with `every`, one that is spent
    already stands as no change."""
    hardware, model = run.hardware, run.model

    def with_(written: str, **groups: Any) -> _Changed:
        return _Changed(written, replace(run, **groups), lengths)

    found: list[list[_Changed]] = [
        [
            with_(f"hardware.per_device_batch_size={rows}", hardware=replace(hardware, per_device_batch_size=rows))
            for rows in _halves(batch_of(run).per_device, 1)
        ],
        [with_("hardware.gradient_checkpointing=true", hardware=replace(hardware, gradient_checkpointing=True))]
        if not hardware.gradient_checkpointing
        else [],
        [with_("model.tuning=lora", model=replace(model, tuning="lora"))] if model.tuning == "full" else [],
        [with_("model.load_in_4bit=true", model=replace(model, load_in_4bit=True))]
        if on_gpu and model.tuning == "lora" and not model.load_in_4bit
        else [],
        [with_("hardware.vllm.standby=true", hardware=replace(hardware, vllm=replace(hardware.vllm, standby=True)))]
        if hardware.vllm.mode == "colocate" and not hardware.vllm.standby
        else [],
        [
            replace(
                with_(
                    f"rollout.max_completion_tokens={tokens}",
                    rollout=replace(run.rollout, max_completion_tokens=tokens),
                ),
                lengths=replace(lengths, completion=tokens),
            )
            for tokens in _halves(lengths.completion, LEAST_COMPLETION_TOKENS)
        ],
    ]
    same = [_Changed("", run, lengths)]
    for values in found:
        if values or every:
            yield values or same


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value
