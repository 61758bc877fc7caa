"""Each architecture is learned from as a naive computation says, or refused with its reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfdistill import Distillation, Teacher
from selfdistill.errors import UserError
from selfdistill.models.agreement import check_head, check_padding, is_told_positions
from selfdistill.models.structure import completion_hidden, head_of
from tests.models.architectures import ARCHITECTURES, PAGE, REFUSED, RIGHT, TOLD, page
from tests.tiny import tiny_tokenizer
from tests.training.naive import (
    Hint,
    assert_same_parameters,
    by_length,
    completion_logps,
    distillation_loss,
    frozen,
    logged,
    make,
    of,
    sgd,
)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # GPT-BigCode
QUICK = ("Qwen3", "GPT-2", "Gemma 2", "xLSTM")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15]]
COMPLETIONS = [[16, 17], [18, 19, 20, 21, 22]]
RTOL = 1e-3


def batch(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded on one side."""
    return tuple(
        torch.nn.utils.rnn.pad_sequence([torch.tensor(fill(row)) for row in rows], batch_first=True, padding_side=side)
        for fill in (list, lambda row: [1] * len(row))
    )


def alone(model: Any) -> list[Tensor]:
    """The log-probabilities (T, V) of each row by itself, in float64."""
    with torch.no_grad():
        return [completion_logps(model, p, c, 1.0) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_padding(name: str) -> None:
    """A row's log-probabilities are the same alone and in a batch, in TRL's way to pad and in ours."""
    model, wanted = ARCHITECTURES[name].model(), ARCHITECTURES[name].padding
    expected, (prompts, prompt_mask) = alone(model), batch(PROMPTS, "left")
    completions, mask = batch(COMPLETIONS, "right")

    def behind_padding() -> list[Tensor]:
        with torch.no_grad():
            ids = {
                "input_ids": torch.cat([prompts, completions], 1),
                "attention_mask": torch.cat([prompt_mask, mask], 1),
            }
            logits = model(**ids, use_cache=False).logits[:, prompts.size(1) - 1 : -1]
        return [logits[i, : len(c)].log_softmax(-1) for i, c in enumerate(COMPLETIONS)]

    assert (apart(behind_padding(), expected) < RTOL) == (wanted == RIGHT)
    if wanted == REFUSED:
        with pytest.raises(UserError, match=f"The student is a {type(model).__name__}: it does not leave out"):
            check_padding(model, tiny_tokenizer(), "The student")
    else:
        check_padding(model, tiny_tokenizer(), "The student")
        assert apart(behind_padding(), expected) < RTOL
    assert is_told_positions(model) == (wanted == TOLD)
    with torch.no_grad():
        hidden, head = completion_hidden(model, prompts, prompt_mask, completions, mask), head_of(model)
    ours = [head.logits(hidden[i, : len(c)]).log_softmax(-1) for i, c in enumerate(COMPLETIONS)]
    assert apart(ours, expected) < RTOL


@pytest.mark.parametrize("name", ALL)
def test_head(name: str) -> None:
    """The logits of our head are the model's, and with another factor or cap the model would be refused."""
    model = ARCHITECTURES[name].model()
    assert ARCHITECTURES[name].head == RIGHT
    check_head(model, tiny_tokenizer(), "The teacher")
    text = model.config.get_text_config()
    text.logit_scale = 2.0 * getattr(text, "logit_scale", 1.0)  # read by our head, and by no model after it is made
    with pytest.raises(UserError, match=f"The teacher is a {type(model).__name__}: its logits are not the product"):
        check_head(model, tiny_tokenizer(), "The teacher")


@pytest.mark.parametrize("name", ALL)
def test_hybrid_step(name: str, tmp_path: Path) -> None:
    """Policy gradient and divergence, against rows by themselves with all their logits."""
    model, wanted = ARCHITECTURES[name].model(), ARCHITECTURES[name].hybrid
    start, settings = frozen(model), Distillation(alpha=0.5, weight=0.7, policy_weight=0.5)
    args = {
        "max_steps": 1, "loss_type": "dr_grpo", "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
    }  # fmt: skip
    if hasattr(model.config, "router_aux_loss_coef"):
        args["router_aux_loss_coef"] = 0.0  # TRL's own addition to the loss

    def trained() -> tuple[Any, list]:
        return make(
            tmp_path, model, args, teacher=Teacher(context=Hint()), distillation=settings, reward_funcs=by_length
        )

    if wanted == REFUSED:
        with pytest.raises(UserError, match=f"The student is a {type(model).__name__}: it does not leave out"):
            trained()
        return
    trainer, batches = trained()
    trainer.train()
    (rows,) = batches
    assert len({len(c) for c in rows.completions}) > 1 and rows.advantages.abs().max() > 0
    policy, student = 0.0, frozen(start)
    for prompt, completion, advantage in zip(rows.prompts, rows.completions, rows.advantages, strict=True):
        logp = completion_logps(student, prompt, completion, 1.0).gather(1, torch.tensor(completion)[:, None])
        policy = policy - advantage * (1 + logp - logp.detach()).sum() / (len(rows.prompts) * 10)
    loss = 0.5 * policy + 0.7 * distillation_loss(student, of(start), rows, settings)
    assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), rel=RTOL, abs=1e-5)
    sgd(student, loss, 0.05)
    assert_same_parameters(trainer.model, student, start, rtol=RTOL)


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.models.architectures writes it"
