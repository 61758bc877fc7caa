"""What is trained is float32, however a model came in, unless someone asked for something else and was told."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from selfdistill import Distillation, Teacher, UserError, config
from selfdistill.machine.memory_estimate import GIB, estimate
from selfdistill.models.loading import load_configured, load_model
from selfdistill.models.precision import precision_line
from tests.command import composed
from tests.models.export.conftest import four_bit, load_base, wide_model
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.naive import Hint, by_length, frozen, lively, lora, make


def trained(model: Any) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.requires_grad}


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A model on disk in the precision that the test asks for."""
    tiny_model().to(getattr(request, "param", torch.bfloat16)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("checkpoint", [torch.bfloat16, torch.float16, torch.float32], indirect=True)
def test_full_training_loads_float32(checkpoint: str) -> None:
    model, _ = load_configured(composed(["model=local", f"model.name={checkpoint}", "model.tuning=full"]).model)
    assert trained(model) == {torch.float32}


@pytest.mark.parametrize("tuning", ["lora", None])
def test_a_base_or_a_teacher_keeps_the_checkpoints_precision(checkpoint: str, tuning: str | None) -> None:
    assert load_model(name=checkpoint, tuning=tuning)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_what_was_asked_for_is_what_is_loaded(checkpoint: str, tuning: str) -> None:
    assert load_model(name=checkpoint, tuning=tuning, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_hardly_a_weight_stays_where_it_was(checkpoint: str, tmp_path: Path) -> None:
    """At the learning rate that runs have by default; the same in bfloat16 leaves nine of ten."""
    model, _ = load_model(name=checkpoint, tuning="full")
    start, args = frozen(model), {"optim": "adamw_torch", "learning_rate": 5e-6, "max_steps": 3}
    trainer, _ = make(tmp_path / "out", model, args, teacher=Teacher(context=Hint()), distillation=Distillation())
    trainer.train()
    pairs = zip(trainer.model.parameters(), start.parameters(), strict=True)
    same = torch.cat([(p == before).flatten() for p, before in pairs])
    assert same.float().mean() < 0.2  # what is left are the embeddings of characters that were never seen


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("given", ["adapter", "config"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_train_in_float32_from_where_they_were(quantised: bool, given: str, tmp_path: Path) -> None:
    """TRL rounds those of a quantised model to bfloat16."""
    pytest.importorskip("bitsandbytes")
    wide_model().save_pretrained(tmp_path)
    options = {"quantization_config": four_bit()} if quantised else {"dtype": torch.bfloat16}
    model, wanted = load_base(tmp_path, **options), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    if given == "adapter":
        model = lora(model, trained=True)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    peft_config = {} if given == "adapter" else {"peft_config": wanted}
    trainer, _ = make(tmp_path / "out", model, {"max_steps": 1}, reward_funcs=by_length, **peft_config)
    assert isinstance(trainer.model, PeftModel) and trained(trainer.model) == {torch.float32}
    if given == "adapter":
        for name, p in trainer.model.named_parameters():
            if p.requires_grad:
                assert torch.equal(p, start[name]), name
    base = "4 or 8 bit" if quantised else "bfloat16"
    assert precision_line(trainer.model) == f"{base}, trained in float32"
    trainer.train()


def test_full_training_in_bfloat16_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "selfdistill"):
        make(tmp_path, lively(dtype=torch.bfloat16), reward_funcs=by_length)
    assert "of the trained parameters are bfloat16" in caplog.text and "model.dtype=auto" in caplog.text
    caplog.clear()
    make(tmp_path, lively(dtype=torch.float32), reward_funcs=by_length)
    assert "bfloat16" not in caplog.text


def test_full_training_in_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The trained parameters are float16"):
        make(tmp_path, lively(dtype=torch.float16), reward_funcs=by_length)
    with pytest.raises(UserError, match="model.dtype=float16 cannot be trained in full"):
        config.check(composed(["model.tuning=full", "model.dtype=float16"]))


def test_precisions_are_named() -> None:
    assert precision_line(tiny_model()) == "float32"
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    assert precision_line(get_peft_model(tiny_model().to(torch.bfloat16), adapter)) == "bfloat16, trained in float32"


@pytest.mark.parametrize(
    ("overrides", "weights", "optimizer"),
    [
        (["model.tuning=full"], 4.0, 12.0),
        (["model.tuning=full", "model.dtype=bfloat16"], 2.0, 6.0),
        (["model.tuning=lora", "model.lora.r=10"], 2.0 + 0.006 * 4, 0.006 * 12),
        (["model.tuning=lora", "model.lora.r=10", "model.load_in_4bit=true"], 0.55 + 0.006 * 4, 0.006 * 12),
    ],
)
def test_the_memory_estimate_has_the_same_precisions(overrides: list[str], weights: float, optimizer: float) -> None:
    parts = estimate(config.check(composed(["model=local", "model.name=x", "model.parameters_billion=1", *overrides])))
    assert parts["weights"] == pytest.approx(weights * 1e9 / GIB)
    assert parts["gradients"] + parts["optimizer"] == pytest.approx(optimizer * 1e9 / GIB)
