import inspect
from dataclasses import fields

import pytest

from selfdistill.config.schema import Student
from selfdistill.models.loading import load_configured, load_model
from tests.command import composed


def test_an_unknown_key_is_refused():
    with pytest.raises(TypeError, match="tunning"):
        load_model(name="embedded", tunning="full")


def test_the_configuration_group_is_loaded_and_holds_every_key():
    group = composed(["model=tiny", "model.dtype=bfloat16"]).model
    model, tokenizer = load_configured(group)
    assert str(model.dtype) == "torch.bfloat16"
    assert tokenizer.padding_side == "left"
    assert set(inspect.signature(load_model).parameters) - {"key"} <= {field.name for field in fields(Student)}
