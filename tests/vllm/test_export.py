"""Exports are loaded by a real vLLM and answer as the trained model does."""

from pathlib import Path

import pytest

from selfdistill.models.export import ExportError
from selfdistill.models.export.lora import Lora
from selfdistill.models.export.merged_16bit import Merged16bit
from selfdistill.models.export.verify import TransformersModel
from selfdistill.models.export.vllm_check import check_with_vllm
from selfdistill.models.loading import load_model, resolve
from tests.models.export.conftest import with_adapter
from tests.vllm.conftest import PYTHON

PROMPTS = [[{"role": "user", "content": text}] for text in ("shout hi", "reverse abc", "add 3 and 4")]


@pytest.mark.parametrize("kind", ["merged_16bit", "lora"])
def test_vllm_answers_as_the_trained_model(kind: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(name="embedded")
    model = with_adapter(model, scale=0.02)
    trained = TransformersModel(model, tokenizer)
    export = Lora() if kind == "lora" else Merged16bit()
    folder = export.run(model, tokenizer, tmp_path / kind, PROMPTS)
    how = {"base": resolve("embedded"), "rank": 4} if kind == "lora" else {}
    (said,) = check_with_vllm(trained, folder, PROMPTS, dtype="float32", python=str(PYTHON), **how)
    assert said.startswith("vLLM 0.")
    assert "3 of 3 greedy answers" in said
    if kind == "merged_16bit":
        with pytest.raises(ExportError, match="another log-probability"):
            check_with_vllm(trained, folder, PROMPTS, dtype="float32", python=str(PYTHON), limit=1e-9)
