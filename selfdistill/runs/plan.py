"""What a run is going to do, before it does it."""

import os

import torch
from omegaconf import DictConfig

from selfdistill.config import Run
from selfdistill.config.batch import batch_of
from selfdistill.machine.memory_estimate import estimate
from selfdistill.models.precision import precision_line
from selfdistill.runs import console
from selfdistill.training.arguments import precision, use_cuda
from selfdistill.training.build import Parts


def show_plan(cfg: DictConfig, run: Run) -> None:
    """Prints the composed tree and a memory estimate; nothing is loaded or written."""
    # The processes that a launcher has started are not connected yet; RANK is the number that it gave to each.
    screen = console.make_console(quiet=int(os.environ.get("RANK", 0)) > 0)
    console.print_all(screen, console.config_tree(cfg))
    screen.print("memory:", console.memory_line(estimate(run), run.hardware.memory_gib))
    screen.print("checked: nothing was loaded or written")


def plan_of(run: Run, parts: Parts) -> console.Plan:
    """The plan of a run whose parts are built."""
    trainer = parts.trainer
    model: torch.nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(count for count, is_trained in parameters if is_trained)
    return console.Plan(
        model=run.model.name,
        device=f"{torch.cuda.get_device_name() if use_cuda(run.hardware) else 'cpu'}, {precision(run.hardware)}",
        parameters=sum(count for count, _ in parameters),
        trained=trained,
        weights=precision_line(model),
        train_rows=len(parts.data.train),
        eval_rows=len(parts.data.eval) if parts.data.eval is not None else 0,
        max_steps=trainer.args.max_steps,
        batch=batch_of(run),
        num_generations=run.num_generations,
        adapter=f"LoRA, rank {run.model.lora.r}" if run.model.tuning == "lora" else "",
        teacher="" if trainer.teacher is None else str(trainer.teacher),
        memory_gib=estimate(run, trained=trained),
    )
