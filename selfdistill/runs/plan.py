"""What a run is going to do, before it does it."""

import os

import torch
from omegaconf import DictConfig

from selfdistill.machine.memory_estimate import estimate
from selfdistill.runs import console
from selfdistill.training import build


def show_plan(cfg: DictConfig) -> None:
    """Prints the composed tree and a memory estimate; nothing is loaded or written."""
    # Nothing connects the processes that a launcher has started yet; it tells each of them its number.
    screen = console.make_console(quiet=int(os.environ.get("RANK", 0)) > 0)
    console.print_all(screen, console.config_tree(cfg))
    screen.print(
        "memory:", console.memory_line(estimate(cfg), cfg.hardware.memory_gib and float(cfg.hardware.memory_gib))
    )
    screen.print("checked: nothing was loaded or written")


def plan_of(cfg: DictConfig, parts: build.Parts) -> console.Plan:
    """The plan of a run whose parts are there."""
    trainer, teacher = parts.trainer, ""
    model: torch.nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(count for count, is_trained in parameters if is_trained)
    if trainer.teacher is not None:
        weights = getattr(trainer.teacher, "weights", trainer.teacher)
        teacher = f"{type(weights).__name__}, sees {type(trainer.teacher.context).__name__}"
    return console.Plan(
        model=str(cfg.model.name),
        device=f"{torch.cuda.get_device_name() if build.use_cuda(cfg) else 'cpu'}, {build.precision(cfg)}",
        parameters=sum(count for count, _ in parameters),
        trained=trained,
        train_rows=len(parts.data.train),
        eval_rows=len(parts.data.eval) if parts.data.eval is not None else 0,
        max_steps=trainer.args.max_steps,
        completions_per_device=cfg.hardware.per_device_batch_size,
        accumulation=cfg.hardware.accumulation_steps,
        processes=trainer.accelerator.num_processes,
        num_generations=cfg.num_generations,
        adapter=f"LoRA, rank {cfg.model.lora.r}" if cfg.model.tuning == "lora" else "",
        teacher=teacher,
        memory_gib=estimate(cfg, trained=trained),
    )
