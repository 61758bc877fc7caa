"""What a training step computes: losses and gradients against a second, naive computation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from selfdistill import Distillation, Teacher
from selfdistill.losses.head import Head
from selfdistill.teachers.weights import Base, Copy, Ema, Live, Model, TrustRegion
from tests.command import sampled
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.naive import (
    Hint,
    assert_same_parameters,
    by_length,
    completion_logps,
    distillation_loss,
    frozen,
    lively,
    logged,
    lora,
    make,
    of,
    passes,
    questions,
    sgd,
)

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")

FORMS = {
    "forward": Distillation(alpha=0.0),
    "reverse": Distillation(alpha=1.0),
    "jensen_shannon": Distillation(alpha=0.5),
    "normalised": Distillation(alpha=0.3, jsd_normalize=True),
    "top_k_with_tail": Distillation(alpha=0.5, top_k=5),
    "top_1_with_tail": Distillation(alpha=0.0, top_k=1),
    "top_k_renormalised": Distillation(alpha=1.0, top_k=5, tail=False),
    "sampled_token": Distillation(alpha=1.0, signal="sampled_token"),
    "skipped_tokens": Distillation(alpha=0.0, skip_tokens=3),
    "pointwise_clip": Distillation(alpha=0.0, pointwise_clip=0.02),
    "own_temperature": Distillation(alpha=0.5, temperature=0.7),
    **{
        f"{mode}_{'all' if counted else 'active'}_rows": Distillation(aggregation=mode, count_inactive_rows=counted)
        for mode in AGGREGATIONS
        for counted in (True, False)
    },
    "weighted": Distillation(weight=0.3, policy_weight=0.0),
}


@pytest.mark.parametrize("form", sampled(FORMS, every=2))
def test_two_steps_equal_the_naive_computation(form: str, tmp_path: Path) -> None:
    """Loss and parameters after two steps of two micro-batches, with rows of many lengths and some without a signal."""
    settings, model = FORMS[form], lively(0)
    start = frozen(model)
    trainer, batches = make(
        tmp_path, model, {"temperature": 0.9}, teacher=Teacher(context=Hint()), distillation=settings
    )
    trainer.train()
    student, temperature = frozen(start), settings.temperature or 0.9
    for step, batch in enumerate(batches):
        assert len({len(c) for c in batch.completions}) > 2
        loss = settings.weight * distillation_loss(student, of(start, temperature), batch, settings, temperature=0.9)
        assert logged(trainer, "loss")[step] == pytest.approx(loss.item(), rel=1e-4)
        sgd(student, loss, 0.05)
    assert_same_parameters(trainer.model, student, start)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["base", "ema", "copy", "live", "trust_region", "model"])
def test_teachers_after_three_steps_of_full_training(weights: str, tied: bool, tmp_path: Path) -> None:
    """The head belongs to the teacher too: the student's would do at the first step and not at the third."""
    model, other = lively(0, tied=tied), lively(5, tied=tied)
    start, settings = frozen(model), Distillation(alpha=0.5)
    kind = {
        "base": Base(), "ema": Ema(0.3), "copy": Copy(2), "live": Live(), "trust_region": TrustRegion(0.4),
        "model": Model(frozen(other), tokenizer=tiny_tokenizer()),
    }[weights]  # fmt: skip
    trainer, batches = make(
        tmp_path, model, {"max_steps": 3, "learning_rate": 0.5}, teacher=Teacher(kind, Hint()), distillation=settings
    )
    trainer.train()
    student, average, snapshot = frozen(start), frozen(start), frozen(start)

    def mixed(prompt: list[int], completion: list[int]) -> torch.Tensor:
        reference, now = (
            completion_logps(start, prompt, completion, 1.0),
            completion_logps(student, prompt, completion, 1.0),
        )
        return (0.6 * reference + 0.4 * now).log_softmax(1)

    teacher = {
        "base": of(start), "ema": of(average), "copy": of(snapshot), "live": of(student), "trust_region": mixed,
        "model": of(other),
    }[weights]  # fmt: skip
    for step, batch in enumerate(batches, start=1):
        sgd(student, distillation_loss(student, teacher, batch, settings), 0.5)
        for mine, theirs, copied in zip(average.parameters(), student.parameters(), snapshot.parameters(), strict=True):
            mine.data.mul_(0.7).add_(theirs.data, alpha=0.3)
            if step % 2 == 0:
                copied.data.copy_(theirs.data)
    # The average is kept in float32.
    assert_same_parameters(trainer.model, student, start, rtol=1e-4 if weights == "ema" else 1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_lora_equals_the_naive_computation(trained: bool, tmp_path: Path) -> None:
    model = lora(trained=trained)
    start, settings = frozen(model), Distillation(alpha=0.0)
    trainer, batches = make(
        tmp_path, model, {"learning_rate": 1.0}, teacher=Teacher(Base(), Hint()), distillation=settings
    )
    trainer.train()
    student = frozen(start)
    for batch in batches:
        sgd(student, distillation_loss(student, of(start), batch, settings), 1.0)
    # PEFT keeps adapters in float32.
    assert_same_parameters(trainer.model, student, start, rtol=1e-4)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_accumulating_two_micro_batches_equals_one_of_double_size(mode: str, tmp_path: Path) -> None:
    settings = Distillation(aggregation=mode, count_inactive_rows=False)
    moved = []
    for size, accumulation in ((4, 2), (8, 1)):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer, _ = make(tmp_path, lively(), args, teacher=Teacher(context=Hint()), distillation=settings)
        trainer.train()
        moved.append(trainer.model)
    assert_same_parameters(moved[0], moved[1], lively(), rtol=1e-6)


def test_rollouts_for_two_steps_are_normalised_over_each(tmp_path: Path) -> None:
    """Without any learning, the losses of the two optimizer steps add up to twice that of all rollouts together."""
    start, settings = lively(), Distillation(alpha=0.5)
    args = {"learning_rate": 0.0, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    trainer, batches = make(tmp_path, frozen(start), args, teacher=Teacher(context=Hint()), distillation=settings)
    trainer.train()
    assert len(batches) == 1
    whole = distillation_loss(start, of(start), batches[0], settings)
    assert sum(logged(trainer, "loss")) == pytest.approx(2 * whole.item(), rel=1e-4)


def test_importance_weights_on_rollouts_used_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient goes through the weights, so the head's, the largest product of all, is made as often as without."""
    made: list[int] = []
    add_gradient = Head.add_gradient
    monkeypatch.setattr(Head, "add_gradient", lambda *given, **out: made.append(1) or add_gradient(*given, **out))
    start, settings = lively(), Distillation(alpha=1.0, is_clip=1.01)
    args = {"num_iterations": 2, "learning_rate": 2.0}
    trainer, batches = make(tmp_path, frozen(start), args, teacher=Teacher(context=Hint()), distillation=settings)
    trainer.train()
    (batch,), student = batches, frozen(start)
    old = [
        completion_logps(start, p, c, 1.0).gather(1, torch.tensor(c)[:, None])[:, 0].detach()
        for p, c in zip(batch.prompts, batch.completions, strict=True)
    ]
    for _ in range(2):
        sgd(student, distillation_loss(student, of(start), batch, settings, old=old), 2.0)
    assert_same_parameters(trainer.model, student, start, rtol=1e-5)
    with_weights = len(made)
    without = Distillation(alpha=1.0, is_clip=None)
    make(tmp_path, start, args, teacher=Teacher(context=Hint()), distillation=without)[0].train()
    assert with_weights == len(made) - with_weights > 0


def test_hybrid_is_the_sum_of_its_terms_in_one_pass(tmp_path: Path) -> None:
    """Policy gradient, KL and divergence: gradients add up, and the student's backbone runs once per micro-batch."""
    moved, counted = {}, {}
    for name, weight, policy_weight, beta in (
        ("both", 0.7, 0.5, 0.0),
        ("policy", 0.0, 0.5, 0.0),
        ("divergence", 0.7, 0.0, 0.0),
    ):
        settings = Distillation(alpha=0.5, weight=weight, policy_weight=policy_weight)
        trainer, _ = make(
            tmp_path, lively(), {"max_steps": 1, "beta": beta}, teacher=Teacher(context=Hint()), distillation=settings,
            reward_funcs=by_length,
        )  # fmt: skip
        with passes(trainer.model) as seen:
            trainer.train()
        moved[name], counted[name] = trainer.model, seen
    start = lively()
    for (name, both), policy, alone, before in zip(
        moved["both"].named_parameters(), moved["policy"].parameters(), moved["divergence"].parameters(),
        start.parameters(), strict=True,
    ):  # fmt: skip
        total = (policy - before) + (alone - before)
        torch.testing.assert_close(both - before, total, rtol=1e-5, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert [p.gradient for p in counted["both"]] == [False, True] * 2
    assert [p.gradient for p in counted["policy"]] == [True] * 2


def test_bfloat16_model(tmp_path: Path) -> None:
    start, settings = lively(dtype=torch.bfloat16), Distillation(alpha=0.0)
    teacher = Teacher(Ema(0.5), Hint())
    trainer, batches = make(tmp_path, frozen(start), teacher=teacher, distillation=settings)
    trainer.train()
    exact = frozen(start).double()
    loss = distillation_loss(exact, of(exact), batches[0], settings)
    assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), rel=0.1)
    assert {t.dtype for t in teacher.weights.shadow.values()} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing_changes_nothing(adapter: bool, tmp_path: Path) -> None:
    models = []
    for checkpointing in (False, True):
        model = lora(trained=True) if adapter else lively()
        trainer, _ = make(
            tmp_path, model, {"gradient_checkpointing": checkpointing}, teacher=Teacher(Ema(0.3), Hint()),
            distillation=Distillation(policy_weight=0.5), reward_funcs=by_length,
        )  # fmt: skip
        trainer.train()
        models.append(trainer.model)
    assert_same_parameters(models[0], models[1], lora(trained=True) if adapter else lively(), rtol=1e-9)


def test_soft_capped_and_scaled_logits(tmp_path: Path) -> None:
    """Values of a head with a cap, a scale and an own size are those of the model that has them."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tiny_tokenizer()), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
        "final_logit_softcapping": 2.0, "attn_logit_softcapping": None, "pad_token_id": 0, "eos_token_id": 2,
        "bos_token_id": None, "query_pre_attn_scalar": 16, "attn_implementation": "eager",
    }  # fmt: skip
    model = Gemma2ForCausalLM(Gemma2Config(**shape)).eval()  # its attention masks fail in float64
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6.0 if p.dim() > 1 else 1.0)
    start, settings = frozen(model), Distillation(alpha=0.5)
    trainer, batches = make(tmp_path, model, {"max_steps": 1}, teacher=Teacher(context=Hint()), distillation=settings)
    trainer.train()
    loss = distillation_loss(start, of(start), batches[0], settings)
    assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-4)


def test_a_teacher_with_a_wider_head(tmp_path: Path) -> None:
    """Models of one family pad their heads to different sizes; what is beyond the smaller one is left out."""
    start, wide = lively(), tiny_model(3, vocabulary=len(tiny_tokenizer()) + 10).double()
    settings = Distillation(alpha=0.0)
    trainer, batches = make(
        tmp_path, frozen(start), {"max_steps": 1}, distillation=settings,
        teacher=Teacher(Model(frozen(wide), tokenizer=tiny_tokenizer()), Hint()),
    )  # fmt: skip
    trainer.train()
    size = len(tiny_tokenizer())
    loss = distillation_loss(
        start, lambda p, c: completion_logps(wide, p, c, 1.0)[:, :size].log_softmax(1), batches[0], settings
    )
    assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-4)


def test_a_short_last_window_weighs_as_much_as_any_other(tmp_path: Path) -> None:
    """Three micro-batches are sampled together, and an epoch's windows are of two and of one."""
    trainer, _ = make(
        tmp_path, lively(), {"steps_per_generation": 3, "max_steps": 4}, teacher=Teacher(context=Hint(lambda i: True)),
        train_dataset=questions(3),
    )  # fmt: skip
    weights: dict[int, list[float]] = {}
    trainer._distillation_loss = lambda model, inputs, states, said: (
        states(inputs["distill_mask"]).sum() * 0 + inputs["distill_weights"].sum()
    )
    original = trainer._compute_loss

    def loss(model: Any, inputs: dict) -> torch.Tensor:
        value = original(model, inputs)
        weights.setdefault(trainer.state.global_step, []).append(value.item())
        return value

    trainer._compute_loss = loss
    trainer.train()
    assert [len(window) for window in weights.values()] == [2, 1, 2, 1]
    assert [sum(window) for window in weights.values()] == pytest.approx([1.0] * 4)
