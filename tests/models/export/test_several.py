"""Several formats at once: what is missing is said, what fails keeps nothing else back."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from selfdistill.errors import UserError
from selfdistill.models.card import Card
from selfdistill.models.export import Exports
from selfdistill.models.export.gguf import Gguf
from selfdistill.models.export.gguf_tokenizer import by_bytes, prepare_tokenizer
from selfdistill.models.export.llama_cpp import find
from selfdistill.models.export.lora import Lora
from selfdistill.models.export.merged_4bit import Merged4bit
from selfdistill.models.export.merged_16bit import Merged16bit
from selfdistill.models.loading import resolve
from tests.models.export.conftest import four_bit, load_base, wide_model, with_adapter
from tests.tiny import tiny_tokenizer

PROMPTS = [[{"role": "user", "content": text}] for text in ("reverse ab", "add 1 and 2", "x")]


def test_one_that_fails_keeps_nothing_back(base: Any, tmp_path: Path) -> None:
    said: list[str] = []
    exports = Exports({"lora": Lora(), "gguf": Gguf(llama_cpp=str(tmp_path)), "merged_16bit": Merged16bit()})
    card = Card("mine", "owner/base", {"data": "`my.jsonl`"}, {"eval/forgetting": (0.0, 0.25)}, configuration="seed: 3")
    done = exports.run(base, tiny_tokenizer(), tmp_path / "export", PROMPTS, card=card, tell=said.append)
    assert "model.tuning=full" in (done["lora"].error or "")
    assert "make gguf" in (done["gguf"].error or "")
    assert done["merged_16bit"].folder == tmp_path / "export" / "merged_16bit"
    assert exports.missing() == [f"export=gguf: {Gguf(llama_cpp=str(tmp_path)).missing()}"]
    assert "merged_16bit: loading it again and comparing" in said
    page = (tmp_path / "export" / "merged_16bit" / "README.md").read_text()
    found = json.loads((tmp_path / "export" / "merged_16bit" / "verification.json").read_text())
    for part in (
        "# mine: merged_16bit",
        "base_model: owner/base",
        "| eval/forgetting | 0.000 | 0.250 |",
        "seed: 3",
        "vllm serve THIS_FOLDER",
        "AutoModelForCausalLM",
        f"differs by {found['max_logprob_difference']:.2g} at most",
    ):
        assert part in page


def test_a_difference_above_the_limit_is_refused(adapted: Any, tmp_path: Path) -> None:
    done = Exports({"merged_16bit": Merged16bit(limit=1e-9)}).run(adapted, tiny_tokenizer(), tmp_path, PROMPTS)
    assert "log-probability differs by" in (done["merged_16bit"].error or "")
    assert "allowed 1e-09" in (done["merged_16bit"].error or "")
    assert not (tmp_path / "merged_16bit" / "README.md").exists()


def test_what_no_format_reads_is_refused() -> None:
    with pytest.raises(UserError, match=r"export\.tpye is not a key: did you mean type"):
        Exports({"gguf": Gguf()}, tpye="q8_0")
    with pytest.raises(UserError, match=r"export\.limit=-1"):
        Exports({"lora": Lora()}, limit=-1)


@pytest.mark.parametrize("packs", [False, True])
def test_nf4_of_both_paths_of_bitsandbytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packs: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: packs)
    wide_model().save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    model = with_adapter(load_base(tmp_path / "wide"), scale=0.02)
    folder = Merged4bit().run(model, tiny_tokenizer(), tmp_path / "out", PROMPTS)
    found = json.loads((folder / "verification.json").read_text())
    assert found["verdict"] == "equal"
    assert "bitsandbytes" in found["consumer"]
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert sorted(path.suffix for path in folder.iterdir() if path.is_dir()) == []
    again = load_base(folder)
    assert type(again.model.layers[0].mlp.up_proj) is bitsandbytes.nn.Linear4bit
    requantised = with_adapter(load_base(tmp_path / "wide", quantization_config=four_bit()), scale=0.02)
    assert Merged4bit().run(requantised, tiny_tokenizer(), tmp_path / "again", PROMPTS)


def test_llama_cpp_is_found_in_a_folder_and_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfdistill.models.export.llama_cpp._has_package", lambda python: False)
    nothing = find(str(tmp_path))
    assert (nothing.converter, nothing.python, nothing.quantise) == (None, None, None)
    assert "its converter (convert_hf_to_gguf.py)" in (nothing.lacks() or "")
    (tmp_path / "build" / "bin").mkdir(parents=True)
    (tmp_path / "convert_hf_to_gguf.py").touch(mode=0o755)
    (tmp_path / "build" / "bin" / "llama-quantize").touch(mode=0o755)
    found = find(str(tmp_path))
    assert found.converter == tmp_path
    assert found.quantise == str(tmp_path / "build" / "bin" / "llama-quantize")
    assert (found.lacks() or "").startswith("of llama.cpp, llama-cpp-python, which loads the result cannot be found")
    monkeypatch.setenv("PATH", f"{tmp_path}:{tmp_path / 'build' / 'bin'}")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "nowhere"))
    assert find().converter == tmp_path.resolve()
    assert find().quantise == str(tmp_path / "build" / "bin" / "llama-quantize")
    with pytest.raises(UserError, match=r"export\.llama_cpp=.*none: there is no such folder"):
        find(str(tmp_path / "none"))


def test_a_tokenizer_of_characters_gets_the_same_ids_by_bytes(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(resolve("embedded")) / name, tmp_path)
    assert prepare_tokenizer(tmp_path, "") == "gpt-2"
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("shout hi", "<|user|>a b\nc<|end|>", "3 + 4 = 7, (yes)"):
        assert again(text).input_ids == tiny_tokenizer()(text).input_ids
    assert (tmp_path / "merges.txt").read_text().splitlines()[1:] == ["ÿ ÿ"]
    letters = {"added_tokens": [], "model": {"type": "WordLevel", "vocab": {"é": 0, "a": 1}}}
    rewritten, merges = by_bytes(letters)
    assert rewritten["model"]["vocab"] == {"Ã©": 0, "a": 1}
    assert merges == [("Ã", "©")]
