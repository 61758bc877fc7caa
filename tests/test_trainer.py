"""What a training step computes: losses and gradients against a second, naive computation; what runs and what doesn't."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trl import GRPOConfig

from selfdistill import Distillation, RolloutSource, SelfDistillTrainer, Teacher, UserError
from selfdistill.teachers.context import Feedback
from selfdistill.teachers.weights import Base, Copy, Ema, Live, Model, TrustRegion
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training import (
    Hint,
    assert_same_parameters,
    by_length,
    completion_logps,
    config,
    distillation_loss,
    frozen,
    lively,
    make,
    of,
    passes,
    questions,
    sgd,
)

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


def lora(model: Any = None, trained: bool = False, dropout: float = 0.0) -> Any:
    """A tiny model with an adapter; a trained one is not zero."""
    wanted = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model or lively(), wanted)
    if trained:
        torch.manual_seed(7)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
    return model


def logged(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


# ---- the loss and its gradient ----

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


@pytest.mark.parametrize("form", FORMS)
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


def test_importance_weights_on_rollouts_used_twice(tmp_path: Path) -> None:
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
    assert [p.gradient for p in counted["both"]] == [True, False] * 2
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


# ---- what runs ----


def test_rows_without_a_signal_cost_nothing(tmp_path: Path) -> None:
    """Exactly the tokens of the distilled rows go through the student, and as many completion tokens through the teacher."""
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


# ---- rewards, feedback, routes, advantages ----


def told(completions: list, **_: Any) -> list[dict]:
    return [
        {"score": float(i % 4 == 0), "feedback": f"number {i}: {len(c[0]['content'])}"}
        for i, c in enumerate(completions)
    ]


def test_feedback_reaches_the_teacher_of_that_very_rollout(tmp_path: Path) -> None:
    context = Feedback(use_solution=False)
    trainer, batches = make(tmp_path, lively(), {"max_steps": 1}, teacher=Teacher(Ema(), context), reward_funcs=told)
    trainer.train()
    (batch,) = batches
    for i, shown in enumerate(batch.shown):
        if i % 4 == 0:
            assert shown is None
        else:
            assert f"number {i}:" in tiny_tokenizer().decode(shown)
    assert batch.scores == [1.0, 0.0, 0.0, 0.0] * 2


def test_routed_failures_leave_successes_to_the_policy_gradient(tmp_path: Path) -> None:
    settings = Distillation(route="failures", policy_weight=1.0, success_threshold=1.0)
    trainer, batches = make(
        tmp_path, lively(), {"max_steps": 1}, teacher=Teacher(context=Hint(lambda i: i != 1)), distillation=settings,
        reward_funcs=told,
    )  # fmt: skip
    trainer.train()
    advantages = batches[0].advantages.tolist()
    assert all(a == 0 for i, a in enumerate(advantages) if i % 4 != 0 and i != 1)
    # Successes, and failures that the teacher has nothing to say about.
    assert all(abs(advantages[i]) > 0.1 for i in (0, 1, 4))
    assert logged(trainer, "distill/active_fraction") == [5 / 8]


def test_signal_as_an_advantage(tmp_path: Path) -> None:
    """advantages = policy_weight * A + weight * (log q - log pi) of the sampled tokens; no divergence is computed."""
    start, other = lively(), lively(5)
    settings = Distillation(alpha=1.0, signal="advantage", weight=0.25, policy_weight=0.5)
    trainer, batches = make(
        tmp_path, frozen(start), {"max_steps": 1}, teacher=Teacher(Model(frozen(other)), Hint()), distillation=settings,
        reward_funcs=by_length,
    )  # fmt: skip
    with passes(trainer.model) as seen:
        trainer.train()
    (batch,) = batches
    scores = torch.tensor(batch.scores).view(-1, 4)
    group = ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)).flatten()
    for i, completion in enumerate(batch.completions):
        tokens = torch.tensor(completion)[:, None]
        expected = 0.5 * group[i].double().expand(len(completion)).clone()
        if batch.shown[i] is not None:
            ours = completion_logps(start, batch.prompts[i], completion, 1.0).gather(1, tokens)[:, 0]
            theirs = completion_logps(other, batch.shown[i], completion, 1.0).gather(1, tokens)[:, 0]
            expected += 0.25 * (theirs - ours)
        torch.testing.assert_close(
            batch.advantages[i][: len(completion)].double(), expected.detach(), rtol=1e-4, atol=1e-4
        )
    assert sum(p.gradient for p in seen) == 2
    assert logged(trainer, "grad_norm")[0] > 0


def test_one_completion_per_prompt_without_a_reward(tmp_path: Path) -> None:
    args = {"num_generations": 1, "max_steps": 1}
    trainer, batches = make(tmp_path, lively(), args, teacher=Teacher(context=Hint(lambda i: True)))
    trainer.train()
    assert len({tuple(p) for p in batches[0].prompts}) == 8
    assert logged(trainer, "grad_norm")[0] > 0
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(output_dir=str(tmp_path), num_generations=1, use_cpu=True, bf16=False)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_off_policy_rows(fraction: float, tmp_path: Path) -> None:
    """Whole groups take their demonstration, the same ones every time, and their cross-entropy is what is learned."""
    source = RolloutSource(on_policy_fraction=fraction, cross_entropy_weight=2.0)
    start, taken = lively(), []
    for _ in range(2):
        trainer, batches = make(tmp_path, frozen(start), {"max_steps": 1, "num_generations": 2}, rollout=source)
        trainer.train()
        demonstrated = trainer._is_demonstration
        taken.append(demonstrated)
    assert taken[0] == taken[1] and taken[0][::2] == taken[0][1::2]
    assert sum(demonstrated) == 8 if fraction == 0 else 0 < sum(demonstrated) < 8
    (batch,) = batches
    for i in range(8):
        text = tiny_tokenizer().decode(batch.completions[i])
        assert demonstrated[i] == (text in [f"{'abcd'[:k]}{tiny_tokenizer().eos_token}" for k in range(1, 5)])
    student = frozen(start)
    loss = _cross_entropy(student, batch, demonstrated)
    assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-4)
    sgd(student, loss, 0.05)
    assert_same_parameters(trainer.model, student, start, rtol=1e-5)


def _cross_entropy(student: Any, batch: Any, demonstrated: list[bool]) -> torch.Tensor:
    rows = [i for i in range(8) if demonstrated[i]]
    logps = [
        completion_logps(student, batch.prompts[i], batch.completions[i], 1.0).gather(
            1, torch.tensor(batch.completions[i])[:, None]
        )
        for i in rows
    ]
    return -2.0 * torch.cat(logps).mean() * len(rows) / 8


def test_demonstrations_and_teacher_share_one_pass(tmp_path: Path) -> None:
    source = RolloutSource(on_policy_fraction=0.5, cross_entropy_weight=1.0)
    trainer, _ = make(
        tmp_path, lively(), {"max_steps": 1}, rollout=source, teacher=Teacher(context=Hint(lambda i: True))
    )
    with passes(trainer.model) as seen:
        trainer.train()
    assert sum(p.gradient for p in seen) == 2


def test_rollouts_from_the_teacher(tmp_path: Path) -> None:
    """They answer the teacher's prompt under the teacher's weights; rows without a signal answer their own."""
    start = lively()
    shifted = Ema(0.5)
    trainer, batches = make(
        tmp_path, frozen(start), {"max_steps": 1, "temperature": 1e-3}, teacher=Teacher(shifted, Hint()),
        rollout=RolloutSource(from_teacher=True),
    )  # fmt: skip
    other = lively(5)
    shifted.shadow = {n: p.detach().float() for n, p in other.named_parameters()}
    shifted.rate = 1e-9
    trainer.train()
    (batch,) = batches
    for i, completion in enumerate(batch.completions):
        asked = batch.shown[i] or batch.prompts[i]
        assert completion_logps(other, asked, completion, 1.0).argmax(1).tolist() == completion
    torch.testing.assert_close(shifted.shadow["model.norm.weight"], other.model.norm.weight.float())


@pytest.mark.parametrize("weights", [TrustRegion(), Model("embedded")])
def test_teachers_that_cannot_sample_are_refused(weights: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="from_teacher"):
        make(tmp_path, lively(), teacher=Teacher(weights, Hint()), rollout=RolloutSource(from_teacher=True))


class NeedsPolicy:
    """A reward that takes the policy's log-probabilities where there are any."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.prompts: list[Any] = []

    def bind(self, scorer: Any) -> None:
        self.scorer = scorer

    def __call__(self, completion_ids: list, prompt_ids: list, policy_logprobs: Any = None, **_: Any) -> list[float]:
        scored = policy_logprobs or self.scorer.token_logprobs(prompt_ids, completion_ids)
        self.given.append(policy_logprobs)
        self.prompts.append(prompt_ids)
        return [float(row.mean()) for row in scored]


@pytest.mark.parametrize(
    ("args", "known"),
    [
        ({}, False),
        ({"num_iterations": 2}, True),
        ({"steps_per_generation": 4}, True),
        ({"num_iterations": 2, "temperature": 0.8}, False),
        ({"num_iterations": 2, "mask_truncated_completions": True}, False),
    ],
)
def test_log_probabilities_that_trl_has_are_used(args: dict, known: bool, tmp_path: Path) -> None:
    reward = NeedsPolicy()
    start = lively()
    trainer, batches = make(tmp_path, frozen(start), {"max_steps": 1, **args}, reward_funcs=reward)
    with passes(trainer.model) as seen:
        trainer.train()
    assert (reward.given[0] is not None) == known
    # TRL scores every row once. Where its numbers are used, nothing else passes through the model without gradient.
    rows = len(batches[0].prompts)
    makes_old = "num_iterations" in args or "steps_per_generation" in args
    scored = sum(p.rows for p in seen if not p.gradient)
    assert scored == rows if known else scored >= rows * int(makes_old)
    for i, completion in enumerate(batches[0].completions):
        logps = completion_logps(start, batches[0].prompts[i], completion, 1.0).gather(
            1, torch.tensor(completion)[:, None]
        )
        assert batches[0].scores[i] == pytest.approx(logps.mean().item(), rel=1e-4)


def test_the_reference_adapter_is_not_taken_for_the_policy(tmp_path: Path) -> None:
    """With an adapter that was trained before, TRL's reference is a second adapter of the same model."""
    reward = NeedsPolicy()
    trainer, _ = make(tmp_path, lora(trained=True), {"max_steps": 2, "beta": 0.1}, reward_funcs=reward)
    trainer.train()
    assert reward.given == [None, None]
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6)


def test_log_probabilities_under_dropout_are_not_used(tmp_path: Path) -> None:
    reward = NeedsPolicy()
    trainer, _ = make(
        tmp_path, lora(trained=True, dropout=0.5), {"max_steps": 1, "num_iterations": 2}, reward_funcs=reward
    )
    trainer.train()
    assert reward.given == [None]


# ---- as people who come from TRL use it ----


def test_plain_trl_arguments_with_a_model_in_memory(tmp_path: Path) -> None:
    """A GRPOConfig, a model that is on no disk, a KL penalty, and reward functions of every kind."""

    def graded(completions: list, answer: list, **_: Any) -> list[dict]:
        return [{"score": float(len(c[0]["content"]) % 3), "feedback": f"not {a}"} for c, a in zip(completions, answer)]

    async def later(completions: list, **_: Any) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    model, args = lively(dtype=torch.float32), dataclasses.asdict(config(tmp_path))
    plain = GRPOConfig(
        **{f: args[f] for f in ("output_dir", "per_device_train_batch_size", "max_steps", "num_generations", "use_cpu")},
        bf16=False, beta=0.1, report_to=[], max_completion_length=6, disable_tqdm=True, logging_steps=1,
        reward_weights=[1.0, 0.5], save_strategy="no", learning_rate=0.1, optim="sgd",
    )  # fmt: skip
    seen: list = []
    trainer = SelfDistillTrainer(
        model, [graded, later], plain, questions(), processing_class=tiny_tokenizer(), teacher=Teacher(Ema(), Feedback()),
        distillation=Distillation(top_k=4, policy_weight=1.0), on_rollouts=lambda *given: seen.append(given),
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-7)
    assert logged(trainer, "kl")[1] > 0
    assert logged(trainer, "rewards/graded/mean") and logged(trainer, "rewards/later/mean") == [1.0, 1.0]
    rollouts = seen[0][0]
    assert all(f.startswith("not ") for f in rollouts.feedback)
    lengths = [len(c) % 3 for c in rollouts.completions]
    assert rollouts.scores == [pytest.approx(n + (0.5 if i % 2 == 0 else 0)) for i, n in enumerate(lengths)]


def test_a_model_changed_in_memory_is_its_own_reference(tmp_path: Path) -> None:
    """TRL would take the weights on disk for the frozen start."""
    tiny_model(1).save_pretrained(tmp_path / "model")
    model = type(tiny_model()).from_pretrained(tmp_path / "model")
    model.load_state_dict(lively(2, dtype=torch.float32).state_dict())
    trainer, _ = make(tmp_path, model, {"beta": 0.1, "max_steps": 1}, reward_funcs=by_length)
    trainer.train()
    assert logged(trainer, "kl") == [pytest.approx(0.0, abs=1e-7)]
    assert model.config._name_or_path == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Nothing to learn from"),
        ({"teacher": Teacher(), "distillation": Distillation(top_k=1000)}, "top_k=1000 is above the vocabulary of"),
        ({"teacher": Teacher(Model(lively(), tokenizer=tiny_tokenizer()))}, None),
        ({"reward_funcs": 3}, "not callable"),
        ({"rollout": RolloutSource(from_teacher=True), "reward_funcs": by_length}, "needs a local teacher"),
        ({"rollout": RolloutSource(on_policy_fraction=0.5), "reward_funcs": by_length, "tools": [print]}, "tools"),
    ],
)
def test_impossible_combinations(given: dict, message: str | None, tmp_path: Path) -> None:
    if message is None:
        make(tmp_path, lively(), **given)
        return
    with pytest.raises(UserError, match=message):
        make(tmp_path, lively(), **given)


def test_too_few_rows_for_one_batch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 3 rows, but completions are sampled for 4 prompts"):
        make(tmp_path, lively(), {"num_generations": 2}, reward_funcs=by_length, train_dataset=questions(3))


def test_a_teacher_that_lacks_its_column(tmp_path: Path) -> None:
    from selfdistill.teachers.context import Demonstration

    with pytest.raises(UserError, match="golden_respons.*no such column.*golden_response"):
        make(tmp_path, lively(), teacher=Teacher(context=Demonstration(field="golden_respons")))


def test_missing_demonstrations_are_named(tmp_path: Path) -> None:
    source = RolloutSource(on_policy_fraction=0.0, cross_entropy_weight=1.0, demonstration_field="solution")
    trainer, _ = make(tmp_path, lively(), rollout=source)
    with pytest.raises(UserError, match=r"demonstration_field=solution.*answer, golden_response"):
        trainer.train()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.5}, "outside"),
        ({"signal": "tokens"}, "write one of distribution"),
        ({"route": "some"}, "write one of all, failures"),
        ({"aggregation": "mean"}, "write one of token_mean"),
        ({"signal": "sampled_token"}, "needs alpha=1"),
        ({"top_k": 1, "tail": False}, "at least 2"),
        ({"temperature": 0.0}, "above 0"),
        ({"weight": -1.0}, "at least 0"),
    ],
)
def test_settings_out_of_range(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distillation(**wrong)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, selfdistill; assert not {'torch','trl','transformers'} & set(sys.modules); "
        "from selfdistill import Distillation; assert Distillation(alpha=1).alpha == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
