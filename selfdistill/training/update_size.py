"""How far an optimizer step moves the weights: a run whose updates are lost looks like any other and learns nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Of so many matrices, evenly spread over the model, so many rows are looked at, every so many steps.
MATRICES = 8
ROWS = 64
EVERY = 10


class UpdateSize(TrainerCallback):
    """Notes `monitor/update_ratio` and `monitor/updated_fraction` at the first step and at every tenth.

    The ratio is the Frobenius norm of what the step adds, over that of the weights that it is added to: of a LoRA
    adapter, the change of its product B·A over the frozen matrix beside it. The fraction is the share of the trained
    entries that the step changed; in bfloat16 an update below about 1/256 of an entry is rounded away.

    Embeddings are left out, since a step leaves most rows of a large one as they are. Nothing is noted where a
    parameter is sharded over processes, under DeepSpeed, which steps at a time of its own, and while the learning rate
    is below half of the configured one, in a warm-up or near the end of a schedule.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._watched: list[_Watched] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        self._watched = []
        slow = event["optimizer"].param_groups[0]["lr"] < args.learning_rate / 2
        if state.global_step % EVERY == 0 and not slow and not self.trainer.is_deepspeed_enabled:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            self._watched = [_Watched(module) for module in _matrices(model)]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for watched in self._watched:
            ratio, changed = watched.compared()
            self.trainer.note("monitor/update_ratio", ratio)
            self.trainer.note("monitor/updated_fraction", changed)
        self._watched = []


class _Watched:
    """The first rows of one matrix, as they were before the step."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.effective, self.trained = _effective(module), _trained(module)

    @torch.no_grad()
    def compared(self) -> tuple[float, float]:
        """The relative size of the step's update, and the share of the entries that it changed."""
        moved = (_effective(self.module) - self.effective).norm()
        base = _base(self.module) if isinstance(self.module, LoraLayer) else self.effective
        pairs = list(zip(_trained(self.module), self.trained, strict=True))
        changed = sum(int((after != before).sum()) for after, before in pairs)
        size = base.norm().clamp_min(torch.finfo(torch.float32).tiny)
        return float(moved / size), changed / sum(after.numel() for after, _ in pairs)


def _matrices(model: Any) -> Sequence[nn.Module]:
    """Some of the modules that are trained and not sharded: adapters where there are any, else linear layers."""
    embeddings = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    adapters: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer) and _adapter(m) is not None]
    linear = [m for m in model.modules() if type(m) is nn.Linear and m.weight.requires_grad and id(m) not in embeddings]
    found = [m for m in adapters or linear if not any(_is_sharded(p) for p in m.parameters())]
    return found[:: max(1, -(-len(found) // MATRICES))]


def _is_sharded(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) or not parameter.numel()


def _adapter(module: LoraLayer) -> str | None:
    """The adapter that is trained, of a linear layer."""
    if not isinstance(module.get_base_layer(), nn.Linear):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A and name in module.lora_B]
    return next((name for name in names if module.lora_B[name].weight.requires_grad), None)


def _parts(module: nn.Module) -> list[Tensor]:
    """What is trained of the first rows: B's rows and all of A, or the weight's rows."""
    if isinstance(module, LoraLayer):
        name = _adapter(module)
        assert name is not None
        second, first = module.lora_B[name], module.lora_A[name]
        assert isinstance(second, nn.Linear) and isinstance(first, nn.Linear)
        return [second.weight[:ROWS], first.weight]
    assert isinstance(module, nn.Linear)
    return [module.weight[:ROWS]]


@torch.no_grad()
def _trained(module: nn.Module) -> list[Tensor]:
    return [part.detach().clone() for part in _parts(module)]


@torch.no_grad()
def _effective(module: nn.Module) -> Tensor:
    """What the module adds to, or is, in its first rows: float32."""
    parts = [part.detach().float() for part in _parts(module)]
    if not isinstance(module, LoraLayer):
        return parts[0].clone()
    name = _adapter(module)
    assert name is not None
    return parts[0] @ parts[1] * module.scaling[name]


@torch.no_grad()
def _base(module: LoraLayer) -> Tensor:
    """The first rows of the frozen matrix; of a quantised one as it is computed with."""
    return dequantize_module_weight(module.get_base_layer())[:ROWS].detach().float()
