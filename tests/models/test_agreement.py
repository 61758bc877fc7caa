"""What is asked of a model before it is trained, and what comes of the answers."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset

from selfdistill import Distillation, RolloutSource, Teacher, UserError
from selfdistill.models.agreement import can_be_asked, check_head, check_log_probs, check_padding, is_told_positions
from selfdistill.rewards import InverseLoss
from selfdistill.teachers.weights import Model
from selfdistill.training import student_checks
from tests.models.architectures import ARCHITECTURES
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.naive import (
    Hint,
    assert_same_parameters,
    by_length,
    distillation_loss,
    frozen,
    lively,
    logged,
    make,
    of,
    questions,
    sgd,
)


def unfaithful() -> Any:
    """A model that does to its logits what nobody knows of."""
    model = lively()
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.sin())
    return model


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"teacher": Teacher(context=Hint())}, "its logits are not the product"),
        (
            {"rollout": RolloutSource(on_policy_fraction=0.0, cross_entropy_weight=1.0)},
            "its logits are not the product",
        ),
        ({"reward_funcs": by_length}, "TRL computes other log-probabilities"),
    ],
)
def test_a_student_with_other_logits_is_refused(given: dict, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"The student is a Qwen3ForCausalLM: {reason}"):
        make(tmp_path, unfaithful(), **given)


def test_a_teacher_with_other_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The teacher is a Qwen3ForCausalLM: its logits are not the product"):
        make(tmp_path, lively(), teacher=Teacher(Model(unfaithful(), tokenizer=tiny_tokenizer()), Hint()))


def test_a_teacher_may_be_one_that_takes_padding_for_tokens(tmp_path: Path) -> None:
    """Its rows go through it with their padding behind them; only a student samples behind padding."""
    other, start, settings = ARCHITECTURES["xLSTM"].model(), lively(dtype=torch.float32), Distillation(alpha=0.5)
    teacher = Teacher(Model(frozen(other), tokenizer=tiny_tokenizer()), Hint())
    trainer, batches = make(tmp_path, frozen(start), {"max_steps": 1}, teacher=teacher, distillation=settings)
    trainer.train()
    loss = distillation_loss(start, of(other), batches[0], settings)
    assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-3)


def test_the_reference_is_told_its_positions_too(tmp_path: Path) -> None:
    model = ARCHITECTURES["GPT-2"].model()
    trainer, _ = make(tmp_path, model, {"beta": 0.1, "max_steps": 1}, reward_funcs=by_length)
    assert is_told_positions(trainer.model) and is_told_positions(trainer.ref_model)
    trainer.train()
    assert logged(trainer, "kl") == [pytest.approx(0.0, abs=1e-6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Qwen3", "Qwen3-MoE", "GPT-2"])
def test_the_precision_of_a_model_is_no_reason_to_refuse_it(name: str, dtype: torch.dtype) -> None:
    model = ARCHITECTURES[name].model().to(dtype)
    check_padding(model, tiny_tokenizer(), "The student")
    check_head(model, tiny_tokenizer(), "The student")
    if name == "GPT-2" or dtype == torch.float32:  # where told positions change nothing, rounding may speak for them
        assert is_told_positions(model) == (name == "GPT-2")


def test_a_load_balancing_loss_that_trl_cannot_compute_is_said_before_training(tmp_path: Path) -> None:
    """TRL takes the number of experts from a key that this configuration calls otherwise."""
    model, args = ARCHITECTURES["Granite 4 (hybrid MoE)"].model(), {"router_aux_loss_coef": 0.0}
    with pytest.raises(UserError, match="load-balancing loss of a GraniteMoeHybridForCausalLM "):
        make(tmp_path, model, reward_funcs=by_length)
    make(tmp_path, model, args, reward_funcs=by_length)
    make(tmp_path, model, teacher=Teacher(context=Hint()), distillation=Distillation())


def test_log_probabilities_at_another_temperature_are_noticed() -> None:
    model = lively()

    def trls(model: Any, ids: torch.Tensor, mask: torch.Tensor, count: int) -> tuple[torch.Tensor]:
        logps = (model(input_ids=ids, attention_mask=mask).logits / 0.5).log_softmax(-1)
        return (logps[:, -count - 1 : -1].gather(2, ids[:, -count:, None]).squeeze(2),)

    check_log_probs(model, tiny_tokenizer(), trls, 0.5, "The student")
    with pytest.raises(UserError, match="TRL computes other"):
        check_log_probs(model, tiny_tokenizer(), trls, 1.0, "The student")


def test_weights_that_are_elsewhere_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        assert not can_be_asked(torch.nn.Linear(2, 2))
    assert can_be_asked(tiny_model())
    monkeypatch.setattr(student_checks, "can_be_asked", lambda _: False)  # as ZeRO-3 leaves it
    trainer, _ = make(tmp_path, lively(), reward_funcs=by_length)
    assert "could not be compared with what it says itself" in trainer.findings[0]


def test_a_student_that_was_asked_leaves_no_finding(tmp_path: Path) -> None:
    assert make(tmp_path, lively(), reward_funcs=by_length)[0].findings == []


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
@pytest.mark.parametrize("policy_weight", [0.0, 0.5])
def test_a_learned_prompt_is_trained_as_a_naive_computation_says(policy_weight: float, tmp_path: Path) -> None:
    """Virtual tokens stand before the padding, and rows are compared with rows that have none."""
    wanted, model = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), lively(dtype=torch.float32)
    torch.manual_seed(0)  # after the model, which is made once for all tests
    start = peft.get_peft_model(model, wanted)
    settings = Distillation(alpha=0.5, policy_weight=policy_weight)
    args = {"max_steps": 1, "loss_type": "dr_grpo", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    args["learning_rate"] = 0.5  # a step that is far above rounding
    trainer, batches = make(
        tmp_path, frozen(start), args, teacher=Teacher(context=Hint()), distillation=settings,
        reward_funcs=by_length if policy_weight else None,
    )  # fmt: skip
    trainer.train()
    student, (rows,), policy = frozen(start), batches, 0.0
    shift = torch.zeros(3, dtype=torch.long)

    def logps(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(shift) :]
        return (logits[len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.training.naive.completion_logps", logps)
        loss = distillation_loss(student, lambda p, c: logps(start, p, c), rows, settings)
    for prompt, completion, advantage in zip(rows.prompts, rows.completions, rows.advantages, strict=True):
        logp = logps(student, prompt, completion).gather(1, torch.tensor(completion)[:, None])
        policy = policy - advantage * (1 + logp - logp.detach()).sum() / (len(rows.prompts) * 10)
    sgd(student, loss + policy_weight * policy, 0.5)
    assert_same_parameters(trainer.model, student, start, rtol=1e-3)


@pytest.mark.parametrize(
    ("given", "reader"),
    [
        ({"teacher": Teacher(context=Hint())}, "a teacher"),
        ({"reward_funcs": InverseLoss()}, "the reward inverse_loss"),
        (
            {"rollout": RolloutSource(on_policy_fraction=0.0, cross_entropy_weight=1.0)},
            "cross-entropy on demonstrations",
        ),
    ],
)
def test_images_are_refused_where_nobody_would_look_at_them(given: dict, reader: str, tmp_path: Path) -> None:
    rows = questions()
    with_images = Dataset.from_dict({**{name: rows[name] for name in rows.column_names}, "image": ["x"] * len(rows)})
    with pytest.raises(UserError, match=f"column image.*{reader} would look at the text alone"):
        make(tmp_path, lively(), train_dataset=with_images, **given)
