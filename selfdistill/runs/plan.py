"""What a run is going to do, before it does it."""

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from selfdistill.config import Run
from selfdistill.config.batch import batch_of
from selfdistill.config.targets import make
from selfdistill.data import DataSplits
from selfdistill.machine.memory_estimate import (
    ADAPTER_SHARE,
    WORDING_TOKENS,
    Forecast,
    Lengths,
    check_fits,
    estimate,
    forecast,
    memory_limit,
)
from selfdistill.models.loading import resolve
from selfdistill.models.location import files_of, parameters
from selfdistill.models.precision import precision_line
from selfdistill.rollout import Prompt, Rollouts
from selfdistill.runs import console
from selfdistill.teachers.interface import BaseTeacher
from selfdistill.tokens import encode_prompts
from selfdistill.training.arguments import precision, trainer_arguments, use_cuda
from selfdistill.training.build import Parts, judge, load_data, load_probes
from selfdistill.training.language import language_findings
from selfdistill.training.reward_trial import try_reward
from selfdistill.training.row_checks import check_rows
from selfdistill.training.trainer import LONGEST_ROWS


def show_plan(cfg: DictConfig, run: Run) -> None:
    """Reads the data, builds what is cheap to build, and prints configuration and plan; no weights are loaded.

    Raises:
        UserError: what a run would be refused for after loading, as far as it can be known now.
    """
    # The processes that a launcher has started are not connected yet; RANK is the number that it gave to each.
    screen = console.make_console(quiet=int(os.environ.get("RANK", 0)) > 0)
    reward = make(run.reward, "reward")
    settings = make(run.eval, "eval")
    teacher = make(run.teacher, "teacher")
    make(run.monitors, "monitors")
    exporter = make(run.export, "export")
    arguments = trainer_arguments(_anywhere(run), Path())
    tokenizer, data = _tokenizer(run), None
    if tokenizer is not None and run.data.get("format") != "hub":
        data = load_data(run, tokenizer)
        load_probes(run, tokenizer)
        check_rows(reward, data.train, run.rollout, str(run.data.get("path", run.data["_target_"])), tokenizer)
        try_reward(reward, data.train, str(run.data.get("path", run.data["_target_"])))
    judged_by = "nothing" if settings is None else judge(run, settings, reward)[1]
    run = _counted(run)
    console.print_all(screen, console.config_tree(cfg))
    console.print_all(screen, console.plan_table(replace(_planned(run, data, arguments.max_steps), judge=judged_by)))
    lengths, on_gpu = lengths_of(run, tokenizer, data, teacher), _on_gpu(run)
    memory = forecast(run, lengths, on_gpu=on_gpu)
    console.print_all(screen, console.memory_table(memory.kept, memory.phases, memory.limit, memory.whose))
    check_fits(run, lengths, memory, on_gpu=on_gpu)
    if data is not None and data.bad_rows:
        screen.print(f"{len(data.bad_rows)} bad rows would be skipped, the first: {data.bad_rows[0]}", markup=False)
    for note in _notes(run, tokenizer, data):
        screen.print(f"note: {note}", markup=False)
    for finding in language_findings(run, ask_server=False):
        screen.print(f"warning: {finding}", markup=False)
    for line in exporter.missing() if exporter is not None else ():
        screen.print(f"warning: {line}", markup=False)
    screen.print("checked: no weights were loaded, nothing was written")


def _anywhere(run: Run) -> Run:
    """The run on whatever device is here: a plan for a GPU may be checked on a machine that has none."""
    here = run.hardware.device if torch.cuda.is_available() else "cpu"
    vllm = replace(run.hardware.vllm, mode=run.hardware.vllm.mode if torch.cuda.is_available() else None)
    return replace(
        run, hardware=replace(run.hardware, device=here, precision="fp32" if here == "cpu" else "auto", vllm=vllm)
    )


def check_memory(run: Run) -> None:
    """Refuses a run whose weights, gradients and optimizer alone cannot fit, before anything is loaded.

    Activations are looked at by `check=true`, which takes some seconds.

    Raises:
        UserError: they cannot.
    """
    run, on_gpu = _counted(run), _on_gpu(run)
    found = Forecast(estimate(run), {}, *memory_limit(run, on_gpu))
    check_fits(run, lengths_of(run, None, None, None), found, on_gpu=on_gpu)


def _counted(run: Run) -> Run:
    """The run with its model's size as its files have it, where they are here."""
    count = parameters(run.model.name)
    return run if count is None else replace(run, model=replace(run.model, parameters_billion=count / 1e9))


def _on_gpu(run: Run) -> bool:
    return run.hardware.device == "cuda" or (run.hardware.device == "auto" and torch.cuda.is_available())


def lengths_of(
    run: Run, tokenizer: PreTrainedTokenizerBase | None, data: DataSplits | None, teacher: BaseTeacher | None
) -> Lengths:
    """The longest prompts of the data, the student's and the teacher's; the most that is let through without data."""
    completion = run.rollout.max_completion_tokens
    prompt = run.model.max_prompt_tokens or max(run.model.max_seq_tokens - completion, 1)
    shown = prompt + completion + WORDING_TOKENS
    if tokenizer is None or data is None:
        return Lengths(prompt, shown, completion)
    rows = sorted(data.train, key=lambda row: len(str(row)))[-LONGEST_ROWS:]

    def longest(prompts: Sequence[Prompt | None]) -> int:
        asked = [prompt for prompt in prompts if prompt is not None]
        return max(map(len, encode_prompts(tokenizer, asked, run.model.chat_template_kwargs)), default=1)

    rollouts = Rollouts.of_rows(rows, 1)
    prompt = longest(rollouts.prompts)
    if teacher is None:
        return Lengths(prompt, 0, completion)
    if teacher.context.needs_reward:  # what it is shown are completions and feedback that do not exist yet
        return Lengths(prompt, prompt + completion + WORDING_TOKENS, completion)
    return Lengths(prompt, longest(teacher.prompts(rollouts, tokenizer)), completion)


def _tokenizer(run: Run) -> PreTrainedTokenizerBase | None:
    """The student's tokenizer, where it is on this machine."""
    try:
        return AutoTokenizer.from_pretrained(
            resolve(run.model.name),
            padding_side="left",
            local_files_only=True,
            revision=run.model.revision,
            trust_remote_code=run.model.trust_remote_code,
        )
    except (OSError, ValueError, ImportError):
        return None


def _planned(run: Run, data: DataSplits | None, max_steps: int) -> console.Plan:
    model, gpu = run.model, torch.cuda.is_available() and run.hardware.device != "cpu"
    known = round((model.parameters_billion or 0) * 1e9)
    trained = known if model.tuning == "full" else int(known * ADAPTER_SHARE * model.lora.r)
    here = run.hardware.device != "cuda" or gpu
    kind = precision(run.hardware) if here else run.hardware.precision
    device = torch.cuda.get_device_name() if gpu else "cpu" if here else "cuda"
    return console.Plan(
        model=model.name,
        device=f"{device}, {kind}",
        parameters=known,
        trained=trained,
        train_rows=len(data.train) if data else 0,
        eval_rows=len(data.eval) if data else 0,
        max_steps=max_steps,
        batch=batch_of(run),
        num_generations=run.num_generations,
        adapter=f"LoRA, rank {model.lora.r}" if model.tuning == "lora" else "",
        teacher=(run.teacher or {}).get("_target_", "").rpartition(".")[2],
        learning_rate=run.learning_rate,
        budget=_budget(run),
        endless=run.max_steps is None and run.epochs is None and not run.dry_run,
    )


def _budget(run: Run) -> str:
    seconds = f"{run.budget_s:g} s of steps" if run.budget_s is not None else ""
    tokens = f"{run.budget_tokens:,} generated tokens" if run.budget_tokens is not None else ""
    return " or ".join(filter(None, (seconds, tokens)))


def _notes(run: Run, tokenizer: PreTrainedTokenizerBase | None, data: DataSplits | None) -> list[str]:
    """What could not be looked at here, and what is not here."""
    notes = []
    if tokenizer is None:
        notes.append(f"model.name={run.model.name} is not on this machine: it would be fetched from the hub")
    elif not files_of(run.model.name):
        notes.append(f"model.name={run.model.name} has no safetensors files here to count its parameters by")
    if data is None:
        notes.append("the rows of the data were not rendered or counted, which takes the model's tokenizer and a file")
    if run.hardware.device == "cuda" and not torch.cuda.is_available():
        notes.append("hardware.device=cuda, and torch sees no GPU here: this run has to be started where there is one")
    if run.model.loader == "unsloth" and find_spec("unsloth") is None:
        notes.append("model.loader=unsloth, and it is not installed here: pip install 'selfdistill[unsloth]'")
    if run.hardware.vllm.mode == "colocate" and find_spec("vllm") is None:
        notes.append("hardware.vllm.mode=colocate, and vLLM is not installed here: pip install 'selfdistill[vllm]'")
    return notes


def plan_of(run: Run, parts: Parts) -> console.Plan:
    """The plan of a run whose parts are built."""
    trainer = parts.trainer
    model: torch.nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    known, trained = sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)
    counted = replace(run, model=replace(run.model, parameters_billion=known / 1e9))
    return console.Plan(
        model=run.model.name,
        device=f"{torch.cuda.get_device_name() if use_cuda(run.hardware) else 'cpu'}, {precision(run.hardware)}",
        parameters=known,
        trained=trained,
        weights=precision_line(model),
        train_rows=len(parts.data.train),
        eval_rows=len(parts.data.eval) if parts.data.eval is not None else 0,
        max_steps=trainer.planned_steps,
        batch=batch_of(run),
        num_generations=run.num_generations,
        adapter=f"LoRA, rank {run.model.lora.r}" if run.model.tuning == "lora" else "",
        teacher="" if trainer.teacher is None else str(trainer.teacher),
        judge=parts.judged_by,
        memory_gib=estimate(counted, trained=trained),
        learning_rate=run.learning_rate,
        budget=_budget(run),
        endless=run.max_steps is None and run.epochs is None and not run.dry_run,
    )
