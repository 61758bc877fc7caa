"""How far a step moves the weights, against the definition, and that updates that are lost show."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerControl, TrainerState, TrainingArguments

from selfdistill.training.update_size import EVERY, UpdateSize
from tests.tiny import tiny_model


class Noting:
    """Stands in for a trainer: keeps what is noted."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.accelerator = model, self
        self.noted: dict[str, list[float]] = {}
        self.is_deepspeed_enabled = False

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    def note(self, name: str, value: float) -> None:
        self.noted.setdefault(name, []).append(value)


def stepped(
    model: torch.nn.Module, learning_rate: float, folder: Path, step: int = 0, configured: float | None = None
) -> dict[str, list[float]]:
    trainer: Any = Noting(model)
    callback, args = (
        UpdateSize(trainer),
        TrainingArguments(
            output_dir=str(folder), report_to=[], use_cpu=True, learning_rate=configured or learning_rate
        ),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    state, control = TrainerState(global_step=step), TrainerControl()
    callback.on_pre_optimizer_step(args, state, control, optimizer=optimizer)
    optimizer.step()
    callback.on_optimizer_step(args, state, control)
    return trainer.noted


def test_full_training(tmp_path: Path) -> None:
    model = tiny_model()
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    noted = stepped(model, 1e-3, tmp_path)
    after = model.model.layers[0].self_attn.q_proj.weight.detach()
    assert noted["monitor/update_ratio"][0] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
    assert noted["monitor/updated_fraction"][0] > 0.99
    assert len(noted["monitor/update_ratio"]) == 7  # of 14 matrices every second
    assert stepped(model, 1e-3, tmp_path, step=EVERY - 1) == {}
    assert stepped(model, 1e-3, tmp_path, configured=3e-3) == {}


def test_an_adapters_effect_is_compared_with_the_matrix_it_is_added_to(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.get_delta_weight("default").detach().clone()
    noted = stepped(model, 1e-3, tmp_path)
    moved = (layer.get_delta_weight("default").detach() - before).norm() / layer.base_layer.weight.norm()
    assert noted["monitor/update_ratio"][0] == pytest.approx(float(moved), rel=1e-4)
    assert noted["monitor/updated_fraction"][0] > 0.99


def test_updates_that_bfloat16_rounds_away_show(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    assert max(stepped(model, 1e-6, tmp_path)["monitor/updated_fraction"]) < 0.5
