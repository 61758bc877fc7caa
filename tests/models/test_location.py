"""What a model's files tell before anything is loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from selfdistill.errors import UserError
from selfdistill.models.location import look_for_model, parameters


def test_the_embedded_model_is_counted_from_its_file() -> None:
    assert parameters("embedded") == 801_408 or 700_000 < (parameters("embedded") or 0) < 900_000


def test_parameters_of_a_folder(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(2, 2, dtype=torch.bfloat16)}, tmp_path / "model-2.safetensors", {"format": "pt"})
    assert parameters(str(tmp_path)) == 21
    (tmp_path / "model-2.safetensors").write_bytes(b"no safetensors")
    assert parameters(str(tmp_path)) is None
    assert parameters("no/such-model-anywhere") is None


@pytest.mark.parametrize("name", ["embedded", "Qwen/Qwen3-0.6B", "gpt2", "absent/model"])
def test_what_the_hub_may_know_passes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    look_for_model(name, "model.name")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "model.name is empty"),
        ("./absent", "no such folder"),
        ("/absent/model", "The folder /absent does not exist"),
        ("models/qwne", "did you mean qwen?"),
        ("a/b/c", "no such folder"),
        ("models", "holds no model"),
        ("file.txt", "is a file"),
    ],
)
def test_a_path_without_a_model_is_refused(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    (tmp_path / "file.txt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="model.name") as refusal:
        look_for_model(name, "model.name")
    assert words in str(refusal.value)
