"""The page of a saved model, and an adapter that finds its base from any folder."""

import json
from pathlib import Path

import pytest

from selfdistill.models.card import Card, finish_folder


def test_the_page_says_what_the_model_is(tmp_path: Path) -> None:
    card = Card("mine", "Qwen/Qwen3-0.6B", {"method": "`sdpo`", "teacher": ""}, {"eval/accuracy": (0.25, 0.75)})
    finish_folder(tmp_path, card)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("---\nbase_model: Qwen/Qwen3-0.6B\nlibrary_name: transformers\n")
    for part in ("# mine", "- method: `sdpo`", "| eval/accuracy | 0.250 | 0.750 |", "AutoModelForCausalLM", "torch "):
        assert part in page
    assert "teacher" not in page


def test_an_adapter_names_its_base_by_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "base", "r": 8}')
    finish_folder(tmp_path / "model", Card("mine", str(tmp_path / "base")))
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert config == {"base_model_name_or_path": str(tmp_path / "base"), "r": 8}
    page = (tmp_path / "model" / "README.md").read_text()
    assert "base_model:" not in page  # a folder is no name on the hub
    assert "peft import AutoPeftModelForCausalLM" in page


def test_a_base_on_the_hub_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}')
    finish_folder(tmp_path, Card("mine", "Qwen/Qwen3-0.6B"))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
