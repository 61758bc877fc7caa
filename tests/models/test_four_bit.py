import pytest
import torch

from selfdistill.models.structure import evaluating
from tests.models.export.conftest import four_bit, load_base, wide_model, with_adapter

IDS = torch.tensor([[4, 10, 11, 12, 13, 2]])


def gradients(model):
    model.zero_grad()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_evaluation_leaves_the_gradient_of_a_4_bit_model_as_it_was(tmp_path, monkeypatch, packs, nested):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: packs)
    wide_model().save_pretrained(tmp_path)
    model = with_adapter(load_base(tmp_path, quantization_config=four_bit(nested)))
    before = gradients(model)
    assert all(gradient.abs().max() > 0 for gradient in before.values())
    with evaluating(model):
        model(IDS)
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
