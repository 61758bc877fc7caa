import copy
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from omegaconf import OmegaConf
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import selfdistill.models.export.folder
from selfdistill.config.targets import make
from selfdistill.errors import UserError
from selfdistill.models.export import ExportError, Format
from selfdistill.models.export.gguf import Gguf
from selfdistill.models.export.lora import Lora
from selfdistill.models.export.merge import merged_tensors
from selfdistill.models.export.merged_4bit import Merged4bit
from selfdistill.models.export.merged_16bit import Merged16bit
from selfdistill.models.export.verify import TransformersModel, compare
from tests.command import composed
from tests.models.export.conftest import four_bit, load_base, wide_model, with_adapter, written
from tests.tiny import tiny_tokenizer

IDS = torch.tensor([[1, 7, 30, 31, 32, 2, 3]])
PROMPTS = [[{"role": "user", "content": text}] for text in ("reverse ab", "add 1 and 2", "x")]
FORMATS_TO_RUN = [Lora(), Merged16bit(), Merged16bit(dtype="float16")]


def verification(folder):
    return json.loads((folder / "verification.json").read_text())


@pytest.mark.parametrize("export", FORMATS_TO_RUN, ids=str)
def test_the_export_is_verified_and_the_model_in_memory_is_untouched(adapted, tmp_path, export):
    adapted.train()
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    flags = [(module.training, type(module)) for module in adapted.modules()]
    config = copy.deepcopy(adapted.get_base_model().config.to_dict())
    gradients = [parameter.requires_grad for parameter in adapted.parameters()]

    folder = export.run(adapted, tiny_tokenizer(), tmp_path / "out", PROMPTS)

    after = adapted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [(module.training, type(module)) for module in adapted.modules()] == flags
    assert adapted.get_base_model().config.to_dict() == config
    assert [parameter.requires_grad for parameter in adapted.parameters()] == gradients
    found = verification(folder)
    assert found["verdict"] == "equal"
    assert found["weights_equal"]
    assert found["tokenizer_equal"]
    assert found["prompts"] == 3
    assert found["tokens"] > 3
    assert found["training_kl"] > 10 * found["mean_kl"]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"):
        assert (folder / name).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_weights_are_those_of_peft_rounded_once(adapted, tmp_path, dtype):
    folder = written(Merged16bit(dtype), adapted, tmp_path / "out")
    expected = copy.deepcopy(adapted).merge_and_unload().state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_base_in_bfloat16_is_merged_in_float32(base_folder, tmp_path):
    model = with_adapter(load_base(base_folder, dtype=torch.bfloat16))
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    folder = written(Merged16bit(), model, tmp_path / "out")
    merged = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(merged, exact.bfloat16())
    assert Merged16bit().verify(TransformersModel(model, tiny_tokenizer()), folder, PROMPTS).verdict == "equal"


def test_full_fine_tuning_merges_to_itself_and_has_no_adapter_to_export(base, tmp_path):
    folder = Merged16bit().run(base, tiny_tokenizer(), tmp_path / "out", PROMPTS)
    assert verification(folder)["training_kl"] is None
    with pytest.raises(UserError, match=r"model\.tuning=full.*export=merged_16bit"):
        Lora().run(base, tiny_tokenizer(), tmp_path / "lora", PROMPTS)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"use_rslora": True, "target_modules": ["up_proj"]},
    ],
    ids=["head", "embedding", "saved head", "dora", "rslora"],
)
@pytest.mark.parametrize("export", [Lora(), Merged16bit()], ids=["lora", "merged"])
@pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings")
def test_adapters_of_other_kinds(base, tmp_path, settings, export):
    model = with_adapter(base, **settings)
    found = verification(export.run(model, tiny_tokenizer(), tmp_path / "out", PROMPTS))
    assert found["verdict"] == "equal"
    assert found["training_kl"] > found["mean_kl"]


@pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings")
def test_merging_an_adapted_head_unties_it(base, tmp_path):
    model = with_adapter(base, target_modules=["lm_head"])
    folder = Merged16bit().run(model, tiny_tokenizer(), tmp_path / "out", PROMPTS)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(folder / "model.safetensors")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_the_adapter_finds_its_base_from_any_folder(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = with_adapter(load_base("base"))
    folder = written(Lora(), model, "out")
    assert folder.is_absolute()
    monkeypatch.chdir("/")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base_folder)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model.eval()(IDS).logits)


def test_an_adapter_of_another_name_lies_at_the_top(base, tmp_path):
    model = with_adapter(base, adapter_name="student")
    folder = Lora().run(model, tiny_tokenizer(), tmp_path / "out", PROMPTS)
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "student").exists()


def test_only_the_active_adapter_is_exported(adapted, tmp_path):
    expected = copy.deepcopy(adapted).merge_and_unload().state_dict()
    torch.manual_seed(5)
    adapted.add_adapter("teacher", copy.deepcopy(adapted.peft_config["default"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "teacher" in name:
                parameter.fill_(9.0)
    assert not (Lora().run(adapted, tiny_tokenizer(), tmp_path / "lora", PROMPTS) / "teacher").exists()
    folder = Merged16bit().run(adapted, tiny_tokenizer(), tmp_path / "merged", PROMPTS)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, expected[name].bfloat16())


def test_the_cache_is_on_in_the_export_after_gradient_checkpointing(adapted, tmp_path):
    base = adapted.get_base_model()
    base.config.use_cache = False
    base.generation_config.use_cache = False
    for export, name in ((Lora(), "lora"), (Merged16bit(), "merged")):
        folder = export.run(adapted, tiny_tokenizer(), tmp_path / name, PROMPTS)
        assert json.loads((folder / "generation_config.json").read_text())["use_cache"] is True
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert base.config.use_cache is False


def test_generation_settings_that_transformers_would_not_save_are_kept(adapted, tmp_path):
    adapted.get_base_model().generation_config.update(do_sample=False, temperature=0.5)
    folder = Merged16bit().run(adapted, tiny_tokenizer(), tmp_path / "out", PROMPTS)
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.5


def test_weights_that_are_not_finite_are_refused(adapted, tmp_path):
    adapted.get_base_model().model.layers[1].mlp.up_proj.lora_A["default"].weight.data[0, 0] = torch.inf
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj"):
        written(Merged16bit(), adapted, tmp_path / "out")
    adapted.get_base_model().model.layers[1].mlp.up_proj.lora_A["default"].weight.data[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"up_proj.*not finite in float16"):
        written(Merged16bit("float16"), adapted, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("fails", [False, True])
def test_an_earlier_export_is_replaced_only_by_a_whole_one(adapted, tmp_path, monkeypatch, fails):
    folder = written(Lora(), adapted, tmp_path / "out")
    (folder / "of_the_first").touch()
    if fails:
        monkeypatch.setattr(selfdistill.models.export.folder, "write_companions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            written(Lora(), adapted, folder)
    else:
        written(Lora(), adapted, folder)
    assert (folder / "of_the_first").exists() is fails
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_a_folder_that_is_no_export_is_left_alone(adapted, tmp_path):
    for folder in (tmp_path / "base", tmp_path / "file"):
        if not folder.exists():
            folder.write_text("mine")
        with pytest.raises(UserError, match="is no export"):
            written(Lora(), adapted, folder)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "base" / "model.safetensors").is_file()
    (tmp_path / "empty").mkdir()
    written(Lora(), adapted, tmp_path / "empty")


def rewrite(file, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(export, model, folder, reason):
    with pytest.raises(ExportError, match=reason):
        export.verify(TransformersModel(model, tiny_tokenizer()), folder, PROMPTS)
    assert verification(folder)["verdict"] == "differs"


def test_verification_notices_a_merge_without_the_adapter(adapted, tmp_path):
    folder = written(Merged16bit(), adapted, tmp_path / "out")
    with adapted.disable_adapter():
        base = {name: tensor.clone() for name, tensor in adapted.get_base_model().state_dict().items()}
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update(
        {name: base[name.replace(".weight", ".base_layer.weight")].bfloat16()
         for name in tensors if name.replace(".weight", ".base_layer.weight") in base}))  # fmt: skip
    refused(Merged16bit(), adapted, folder, "mean KL")


def test_verification_notices_one_changed_weight(adapted, tmp_path):
    merged = written(Merged16bit(), adapted, tmp_path / "merged")
    rewrite(merged / "model.safetensors", lambda t: t["model.norm.weight"][:1].mul_(1.01))
    refused(Merged16bit(), adapted, merged, "written weights differ")
    lora = written(Lora(), adapted, tmp_path / "lora")
    rewrite(lora / "adapter_model.safetensors", lambda t: t[sorted(t)[0]][:1].mul_(1.0001))
    refused(Lora(), adapted, lora, "written weights differ")


def test_verification_notices_another_base(adapted, base_folder, tmp_path):
    folder = written(Lora(), adapted, tmp_path / "out")
    rewrite(base_folder / "model.safetensors", lambda t: t["model.embed_tokens.weight"].mul_(1.2))
    refused(Lora(), adapted, folder, "mean KL")


@pytest.mark.parametrize("export", [Lora(), Merged16bit()], ids=["lora", "merged"])
def test_verification_notices_another_chat_template(adapted, tmp_path, export):
    folder = written(export, adapted, tmp_path / "out")
    template = folder / "chat_template.jinja"
    template.write_text("hi " + template.read_text())
    refused(export, adapted, folder, "chat template")


def test_rounding_that_outweighs_the_training_is_said(base, tmp_path, caplog):
    model = with_adapter(base, scale=1e-5)
    folder = Merged16bit().run(model, tiny_tokenizer(), tmp_path / "out", PROMPTS)
    assert "the export keeps little of it" in caplog.text
    assert verification(folder)["training_kl"] < verification(folder)["mean_kl"]


def test_without_prompts_general_ones_are_used(adapted, tmp_path):
    assert verification(Lora().run(adapted, tiny_tokenizer(), tmp_path / "out"))["prompts"] == 3


def test_the_merged_folder_needs_nothing_else(adapted, base_folder, tmp_path):
    folder = written(Merged16bit(), adapted, tmp_path / "out")
    shutil.rmtree(base_folder)
    moved = folder.rename(tmp_path / "moved")
    assert AutoModelForCausalLM.from_pretrained(moved)(IDS).logits.shape == (1, 7, len(tiny_tokenizer()))
    assert AutoTokenizer.from_pretrained(moved).chat_template == tiny_tokenizer().chat_template


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("export", [Lora(), Merged16bit()], ids=["lora", "merged"])
def test_a_4_bit_base(base_folder, tmp_path, monkeypatch, export, packs):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: packs)
    model = with_adapter(load_base(base_folder, quantization_config=four_bit()))
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    stored, weight = layer.base_layer.weight.data.clone(), layer.base_layer.weight
    folder = export.run(model, tiny_tokenizer(), tmp_path / "out", PROMPTS)
    assert layer.base_layer.weight is weight
    assert torch.equal(weight.data, stored)  # as on every machine: never packed
    assert verification(folder)["verdict"] == "equal"
    assert "4 bit" in (folder / "README.md").read_text()
    if isinstance(export, Merged16bit):
        merged = load_file(folder / "model.safetensors")
        dequantised = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        exact = dequantised + layer.get_delta_weight("default")
        assert torch.equal(merged["model.layers.1.self_attn.q_proj.weight"], exact.bfloat16())
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())


@pytest.mark.parametrize("nested", [False, True])
def test_a_base_that_came_packed_is_exported_with_the_weights_it_computes_with(tmp_path, nested):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    wide_model().save_pretrained(tmp_path / "wide")
    model = with_adapter(load_base(tmp_path / "wide", quantization_config=four_bit(nested)))
    unpacked = dict(merged_tensors(model.get_base_model(), torch.float32))
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):  # what its forward pass does in evaluation mode
            pack = bitsandbytes.functional._convert_weight_packed_for_cpu
            layer.weight.data, _ = pack(layer.weight.data, layer.weight.quant_state)
    folder = Merged16bit().run(model, tiny_tokenizer(), tmp_path / "out", PROMPTS)
    found = load_file(folder / "model.safetensors")
    # Packing rounds the scales to bfloat16, and the export rounds the sum: half of the last of eight bits, twice.
    assert all(torch.allclose(unpacked[name], tensor.float(), rtol=2**-7, atol=2**-7) for name, tensor in found.items())
    assert verification(folder)["weights_equal"]


def test_a_format_of_ones_own_is_named_once(adapted, tmp_path):
    @dataclass
    class Page(Format):
        name = "page"
        needs_adapter = True

        def write(self, trained, folder):
            (folder / "model.txt").write_text("A model.")

        def verify(self, trained, folder, prompts=()):
            if prompts != PROMPTS or (folder / "model.txt").read_text() != "A model.":
                raise ExportError("not what was written")
            loaded = replace(trained, model=trained.model)
            return compare(trained, loaded, folder, prompts, weights_equal=None, consumer="an editor")

    assert Page().run(adapted, tiny_tokenizer(), tmp_path / "out", PROMPTS) == tmp_path / "out"
    with pytest.raises(ExportError, match="not what was written"):
        Page().run(adapted, tiny_tokenizer(), tmp_path / "out", [])
    with pytest.raises(UserError, match="export=page needs an adapter"):
        Page().run(adapted.get_base_model(), tiny_tokenizer(), tmp_path / "none", PROMPTS)
    assert not (tmp_path / "none").exists()


def test_formats_are_known_without_torch():
    program = (
        "import sys\nfrom selfdistill.models.export.lora import Lora\n"
        "from selfdistill.models.export.merged_16bit import Merged16bit\n"
        "from selfdistill.models.export.merged_4bit import Merged4bit\n"
        "from selfdistill.models.export.gguf import Gguf\n"
        "print(*[f.name for f in (Lora, Merged16bit, Merged4bit, Gguf) if f.needs_adapter], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "lora False\n"


def test_the_shipped_configurations_build():
    line = ["export=[lora,merged_16bit,merged_4bit,gguf]", "export.type=q4_k_m", "export.limit=0.5"]
    exports = make(OmegaConf.to_container(composed(line).export, resolve=True), "export")
    assert exports.formats == {
        "lora": Lora(limit=0.5),
        "merged_16bit": Merged16bit(limit=0.5, dtype="bfloat16"),
        "merged_4bit": Merged4bit(limit=0.5),
        "gguf": Gguf(limit=0.5, type="q4_k_m"),
    }
    assert (exports.push_to, exports.private) == (None, True)
    assert composed([]).export is None
    with pytest.raises(UserError, match=r"export\.type=q9: write one of f32, f16"):
        Gguf(type="q9")
    with pytest.raises(UserError, match=r"export\.dtype=int8"):
        Merged16bit(dtype="int8")
