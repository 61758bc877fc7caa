"""What runs in a training step and what doesn't: passes through the model, modes, memory."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfdistill import Distillation, Teacher
from selfdistill.teachers.weights import Base, Ema, Model
from tests.training.naive import Hint, by_length, lively, logged, lora, make, passes


def test_rows_without_a_signal_cost_nothing(tmp_path: Path) -> None:
    """Exactly the distilled rows go through the student, and as many completion tokens through the teacher."""
    trainer, batches = make(tmp_path, lively(), {"max_steps": 1}, teacher=Teacher(context=Hint(lambda i: i in (2, 5))))
    with passes(trainer.model) as seen:
        trainer.train()
    (batch,) = batches
    student = sum(len(batch.prompts[i]) + len(batch.completions[i]) for i in (2, 5))
    teacher = sum(len(batch.shown[i]) + len(batch.completions[i]) for i in (2, 5))
    assert sum(p.tokens for p in seen if p.gradient) == student
    assert sum(p.tokens for p in seen if not p.gradient) == teacher
    assert sum(p.rows for p in seen) == 4
    assert logged(trainer, "distill/active_fraction") == [0.25]


def test_nothing_to_learn_is_a_zero_on_the_graph_and_training_goes_on(tmp_path: Path) -> None:
    active_steps = {1}
    context = Hint()
    context.active = lambda i: len(context.seen) - 1 in active_steps
    trainer, _ = make(tmp_path, lively(), {"max_steps": 3}, teacher=Teacher(Ema(0.5), context))
    with passes(trainer.model) as seen:
        trainer.train()
    losses, norms = logged(trainer, "loss"), logged(trainer, "grad_norm")
    assert losses[0] == losses[2] == norms[0] == norms[2] == 0.0
    assert losses[1] > 0 and norms[1] > 0
    assert len(seen) == 4
    assert logged(trainer, "distill/active_fraction") == [0.0, 1.0, 0.0]


def test_a_weight_of_zero_costs_no_pass_and_no_prompt(tmp_path: Path) -> None:
    context = Hint()
    trainer, _ = make(
        tmp_path, lively(), teacher=Teacher(Base(), context), distillation=Distillation(weight=0.0, policy_weight=1.0),
        reward_funcs=by_length,
    )  # fmt: skip
    with passes(trainer.model) as seen:
        trainer.train()
    assert all(p.gradient for p in seen) and len(seen) == 4
    assert not context.seen


def test_teacher_passes_are_in_evaluation_mode_and_modes_return(tmp_path: Path) -> None:
    model = lora(dropout=0.5, trained=True)
    trainer, _ = make(
        tmp_path, model, teacher=Teacher(Ema(0.3), Hint()), distillation=Distillation(signal="distribution")
    )
    trainer.model.train()
    still = trainer.model.get_base_model().model.layers[0].mlp
    modes = []
    original = trainer._compute_loss

    def loss(model: Any, inputs: dict) -> torch.Tensor:
        still.eval()  # a module that someone froze stays as it was
        value = original(model, inputs)
        modes.append((model.training, still.training))
        return value

    trainer._compute_loss = loss
    with passes(trainer.model) as seen:
        trainer.train()
    assert all(p.training == p.gradient for p in seen)
    assert modes == [(True, False)] * 4


def test_no_gradient_reaches_the_teacher(tmp_path: Path) -> None:
    other = lively(5)
    trainer, _ = make(tmp_path, lively(), teacher=Teacher(Model(other), Hint()))
    trainer.train()
    assert all(p.grad is None and not p.requires_grad for p in other.parameters())
    torch.testing.assert_close(dict(other.named_parameters()), dict(lively(5).named_parameters()), rtol=0, atol=0)


def test_completions_are_the_same_ids_for_student_and_teacher(tmp_path: Path) -> None:
    trainer, batches = make(tmp_path, lively(), {"max_steps": 1}, teacher=Teacher(context=Hint()))
    asked: list[list[int]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not kwargs.get("use_cache") and kwargs.get("input_ids") is not None:
            pairs = zip(kwargs["input_ids"], kwargs["attention_mask"].bool(), strict=True)
            asked.append((torch.is_grad_enabled(), [ids[mask].tolist() for ids, mask in pairs]))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    (batch,) = batches
    rows = range(len(batch.prompts))
    student = [row for gradient, rows_ in asked if gradient for row in rows_]
    teacher = [row for gradient, rows_ in asked if not gradient for row in rows_]
    assert sorted(student) == sorted(batch.prompts[i] + batch.completions[i] for i in rows if batch.shown[i])
    assert sorted(teacher) == sorted(batch.shown[i] + batch.completions[i] for i in rows if batch.shown[i])


def test_lora_keeps_one_base_in_memory(tmp_path: Path) -> None:
    teacher = Teacher(Ema(0.1), Hint())
    trainer, _ = make(tmp_path, lora(), {"beta": 0.1}, teacher=teacher, reward_funcs=by_length)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad and True)
    assert sum(t.numel() for t in teacher.weights.shadow.values()) <= trained
    assert all("lora_" in name and ".ref." not in name for name in teacher.weights.shadow)
    base = {p.data_ptr() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    inside = trainer.model.get_base_model()
    with teacher.weights.exchanged():
        assert {p.data_ptr() for n, p in trainer.model.named_parameters() if "lora_" not in n} == base
    assert trainer.ref_model is None
    assert inside is trainer.model.get_base_model()
