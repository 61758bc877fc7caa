"""Where a model keeps what the losses need."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from selfdistill.models.structure import (
    captured_hidden,
    completion_hidden,
    evaluating,
    has_dropout,
    head_of,
    inner_model,
    is_reference,
)
from tests.tiny import tiny_model


def adapted(**changes: Any) -> Any:
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(tiny_model(tied=False), LoraConfig(**settings)).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def models() -> dict[str, Any]:
    return {
        "tied": tiny_model(tied=True),
        "untied": tiny_model(tied=False),
        "adapted": adapted(),
        "adapted_head": adapted(target_modules=["q_proj", "lm_head"]),
        "wrapped": Wrapper(adapted()),
    }


@pytest.mark.parametrize("kind", models())
def test_head_of_hidden_states_gives_the_logits(kind: str) -> None:
    model = models()[kind]
    prompts, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ids, ends = torch.tensor([[11, 12, 13], [14, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        hidden = completion_hidden(model, prompts, mask, ids, ends)
        found = head_of(model).logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        for row, (start, end) in enumerate(((2, 3), (0, 2))):
            sequence = torch.cat([prompts[row, start:], ids[row, :end]])[None]
            expected = model(input_ids=sequence).logits[0, 3 - start : 3 - start + end]
            torch.testing.assert_close(found[row, :end], expected, rtol=1e-4, atol=1e-5)
    assert hidden.shape == (2, 3, 32)


def test_padding_that_all_rows_share_is_left_out() -> None:
    model = tiny_model()
    prompts, mask = torch.tensor([[0, 0, 0, 5], [0, 0, 6, 7]]), torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]])
    ids = torch.tensor([[8, 9], [10, 11]])
    with torch.no_grad(), captured_hidden(model) as collected:
        completion_hidden(model, prompts, mask, ids, torch.ones_like(ids))
    assert collected[0].shape[:2] == (2, 4)


def test_captured_states_carry_gradient_and_the_hook_goes() -> None:
    model = tiny_model()
    with captured_hidden(model) as collected:
        model(input_ids=torch.tensor([[5, 6]]))
    collected[0].sum().backward()
    assert model.model.embed_tokens.weight.grad is not None
    model(input_ids=torch.tensor([[5, 6]]))
    assert len(collected) == 1


def test_evaluating_restores_each_module() -> None:
    model = adapted(lora_dropout=0.5).train()
    still = inner_model(model).model.layers[0].eval()
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert model.training and not still.training
    assert torch.is_grad_enabled()


def test_evaluating_takes_a_plain_function() -> None:
    with evaluating(lambda **_: None):
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_dropout_is_found() -> None:
    assert not has_dropout(tiny_model()) and not has_dropout(adapted())
    assert has_dropout(adapted(lora_dropout=0.1))
    model = tiny_model()
    model.config.attention_dropout = 0.1
    assert has_dropout(model)


def test_reference_adapters_are_told_from_the_trained_one() -> None:
    model = adapted()
    assert not is_reference(model) and not is_reference(tiny_model())
    with model.disable_adapter():
        assert is_reference(model)
    model.add_adapter("ref", model.peft_config["default"])
    assert not is_reference(model)
    model.set_adapter("ref")
    assert is_reference(model)
    model.set_adapter("default")
    assert not is_reference(model)


def test_heads_narrowed_and_detached() -> None:
    head = head_of(tiny_model(tied=False))
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(head.narrowed(20).logits(hidden), head.logits(hidden)[:, :20])
    assert head.narrowed(len(head.weight)) is head
    fixed, before = head.detached(), head.logits(hidden)
    with torch.no_grad():
        head.weight.data = head.weight.data + 1.0
    torch.testing.assert_close(fixed.logits(hidden), before)
    assert not fixed.weight.requires_grad
