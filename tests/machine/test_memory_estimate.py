"""The memory of a run, forecast from its configuration and the model's config.json."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3Config, Qwen3Config

from selfdistill import UserError, config
from selfdistill.config.schema import Run
from selfdistill.machine import memory_estimate
from selfdistill.machine.memory_estimate import GIB, Forecast, Lengths, check_fits, estimate, forecast
from selfdistill.machine.simulated_passes import Passes, Recipe, SimulatedModel, _Alive
from tests.command import command, composed
from tests.models.architectures import ARCHITECTURES, SHAPE
from tests.tiny import tiny_model

# No configuration of a run can name it: AutoModelForCausalLM does not know it.
FROM_PYTHON_ALONE = {"Muse Glimmer (image and text)"}
# Forecast without activations: a pass chooses experts by numbers, or writes with a cache or positions of its own kind.
WITHOUT_PASSES = {
    "DeepSeek-V3", "GPT-OSS", "Granite 4 (hybrid MoE)", "Jamba", "MiniMax", "Mixtral", "OLMoE", "Qwen2-MoE",
    "Qwen3-MoE", "Qwen3-Next",
    "BioGPT", "Falcon Mamba", "Mamba", "Mamba-2", "OPT", "RecurrentGemma", "RWKV", "xLSTM", "XGLM",
}  # fmt: skip
LENGTHS = Lengths(prompt=40, teacher_prompt=60, completion=24)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def checked(*overrides: str) -> Run:
    return config.check(composed(["hardware=cpu", *overrides]))


def recipe(layers: int = 2, **changes: object) -> Recipe:
    shape = tiny_model().config.to_dict() | {"num_hidden_layers": layers, "layer_types": None}
    return replace(Recipe(Qwen3Config(**shape), torch.float32), **changes)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_pass_without_numbers_takes_what_a_pass_takes(adapter: LoraConfig | None) -> None:
    simulated = SimulatedModel(recipe(adapter=adapter))
    real = tiny_model().train() if adapter is None else get_peft_model(tiny_model(), LORA).train()
    assert simulated.parameters == sum(p.numel() for p in real.parameters())
    assert simulated.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert simulated.weight_bytes == 4 * simulated.parameters
    alive = _Alive()
    for p in (*real.parameters(), *real.buffers()):
        alive.know(p)
    decoder = real.get_decoder() if adapter is None else real.get_base_model().get_decoder()
    with alive:
        ids = torch.zeros(3, 50, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        held = alive.now
        hidden.sum().backward()
    found = simulated.learning(3, 50, scores=False, beside=False)
    assert found.held == pytest.approx(held, rel=0.05)
    assert found.most == pytest.approx(alive.most, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_are_alike_are_extrapolated(checkpointing: bool) -> None:
    deep = recipe(7, gradient_checkpointing=checkpointing)
    passes, whole = Passes(deep), SimulatedModel(deep)
    found, expected = (model.learning(4, 64, scores=False, beside=True) for model in (passes, whole))
    assert found.held == pytest.approx(expected.held, rel=0.01)
    assert found.most == pytest.approx(expected.most, rel=0.02)
    assert passes.reading(4, 64) == pytest.approx(whole.reading(4, 64), rel=0.02)
    assert passes.writing(4, 30, 10) == pytest.approx(whole.writing(4, 30, 10), rel=0.02)


@pytest.mark.long
def test_checkpointing_and_fewer_rows_take_less() -> None:
    full, saving = Passes(recipe(6)), Passes(recipe(6, gradient_checkpointing=True))
    held = [m.learning(8, 64, scores=True, beside=True).held for m in (full, saving)]
    assert held[1] < held[0] / 3
    assert full.learning(4, 64, scores=False, beside=False).held == pytest.approx(held[0] / 2, rel=0.1)


@pytest.fixture(scope="module")
def any_run() -> Run:
    return checked("eval=none")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # GPT-BigCode
@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in FROM_PYTHON_ALONE])
def test_every_architecture_is_forecast(
    name: str, any_run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = ARCHITECTURES[name].model()
    model.config.save_pretrained(tmp_path)
    run = replace(any_run, model=replace(any_run.model, name=str(tmp_path)))
    found = forecast(run, LENGTHS, on_gpu=False)
    assert found.kept["weights"] * GIB == 4 * sum(p.numel() for p in model.parameters())
    assert (not found.phases) == (name in WITHOUT_PASSES)
    assert "Traceback" not in capfd.readouterr().err


def seeing() -> Gemma3Config:
    """A model that sees as well: its layers are told by the configuration of its part for text."""
    text = SHAPE | {"vocab_size": 100, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    return Gemma3Config(text_config=text, vision_config=sight | {"image_size": 28, "patch_size": 14})


def test_a_model_that_sees_is_forecast(any_run: Run, tmp_path: Path) -> None:
    seeing().save_pretrained(tmp_path)
    run = replace(any_run, model=replace(any_run.model, name=str(tmp_path)))
    found = forecast(run, LENGTHS, on_gpu=False)
    assert found.phases["learning"] > found.phases["updating the weights"] > 0


def test_a_model_that_cannot_be_built_without_numbers_is_estimated(
    any_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(run: Run, on_gpu: bool) -> None:
        raise AttributeError("num_hidden_layers")

    monkeypatch.setattr(memory_estimate, "_passes_of", refusing)
    assert forecast(any_run, LENGTHS, on_gpu=False).kept == estimate(any_run)


@pytest.mark.long
def test_each_part_and_phase() -> None:
    run = checked("reward=none", "teacher=demonstration", "teacher/weights=ema", "hardware.per_device_batch_size=8")
    found = forecast(run, LENGTHS, on_gpu=False)
    count = found.kept["weights"] * GIB / 4
    assert 0.7e6 < count < 0.9e6
    assert found.kept["optimizer"] == pytest.approx(2 * found.kept["weights"])
    assert found.kept["teacher's copy"] == pytest.approx(found.kept["weights"])
    named = {"writing completions", "asking the teacher", "learning", "updating the weights", "evaluating"}
    assert found.phases.keys() == named
    assert found.total == sum(found.kept.values()) + max(found.phases.values())
    more = forecast(run, replace(LENGTHS, completion=200), on_gpu=False)
    assert all(more.phases[name] > found.phases[name] for name in list(found.phases)[:3])


def test_without_the_models_files_only_what_stays_is_known() -> None:
    run = checked("model=qwen3_0_6b")
    found = forecast(run, LENGTHS, on_gpu=True)
    assert found.phases == {} and found.kept == estimate(run)


@pytest.mark.long
def test_vllm_that_sleeps_is_in_memory_while_it_writes_alone() -> None:
    asked = ["hardware=gpu_24gb", "hardware.vllm.gpu_memory_utilization=0.5"]
    asleep, awake = (checked(*asked, f"hardware.vllm.standby={value}") for value in ("true", "false"))
    assert "vLLM" not in estimate(asleep) and estimate(awake)["vLLM"] == 12
    assert forecast(asleep, LENGTHS, on_gpu=True).phases["writing completions"] == 12
    assert "writing completions" not in forecast(awake, LENGTHS, on_gpu=True).phases


@pytest.mark.parametrize("mode", ["null", "server"])
def test_an_engine_that_is_not_here_does_not_sleep_here(mode: str, any_run: Run) -> None:
    vllm = replace(any_run.hardware.vllm, mode=None if mode == "null" else mode, server_base_url="http://x")
    asleep, awake = (
        replace(any_run, hardware=replace(any_run.hardware, vllm=replace(vllm, standby=standby)))
        for standby in (True, False)
    )
    found = forecast(asleep, LENGTHS, on_gpu=False).phases
    assert found == forecast(awake, LENGTHS, on_gpu=False).phases
    assert found.get("writing completions", 0) > 0 or mode == "server" and "writing completions" not in found


@pytest.mark.parametrize(
    ("device", "card", "memory_gib", "reserved"),
    [("auto", 40.0, None, 20), ("cuda", 40.0, 24.0, 12), ("auto", None, None, 3), ("cpu", 40.0, None, 3)],
)
def test_vllms_share_is_that_of_the_card_or_what_it_takes_on_a_cpu(
    device: str, card: float | None, memory_gib: float | None, reserved: float, any_run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(memory_estimate, "machine_memory_gib", lambda gpu: card)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    vllm = replace(any_run.hardware.vllm, mode="colocate", gpu_memory_utilization=0.5)
    hardware = replace(any_run.hardware, device=device, memory_gib=memory_gib, vllm=vllm)
    two_gib = replace(any_run.model, parameters_billion=0.5 * GIB / 1e9)
    assert estimate(replace(any_run, hardware=hardware, model=two_gib))["vLLM"] == pytest.approx(reserved)


def test_what_a_run_does_not_do_is_not_forecast(any_run: Run) -> None:
    rollout = replace(any_run.rollout, on_policy_fraction=0.0, cross_entropy_weight=1.0)
    assert "writing completions" not in forecast(replace(any_run, rollout=rollout), LENGTHS, on_gpu=False).phases


def test_a_teacher_of_its_own_is_forecast_in_its_own_size(tmp_path: Path) -> None:
    large = tiny_model().config
    large.update({"hidden_size": 16 * large.hidden_size, "num_hidden_layers": 2, "layer_types": None})
    large.save_pretrained(tmp_path)
    taught = ["reward=none", "teacher=model", "eval=none", "alpha=0"]
    own, other = (
        forecast(checked(*taught, f"teacher.weights.name={name}"), LENGTHS, on_gpu=False).phases["asking the teacher"]
        for name in ("embedded", tmp_path)
    )
    assert other > 1.3 * own


@pytest.mark.long
def test_the_proposed_value_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_estimate, "PROGRAM_CPU_GIB", 0.0)
    lengths = replace(LENGTHS, completion=200)
    run = checked("hardware.per_device_batch_size=64", "completions_per_step=64", "eval=none")
    needed = forecast(run, lengths, on_gpu=False)
    assert set(needed.phases) == {"writing completions", "learning", "updating the weights"}
    room = replace(run, hardware=replace(run.hardware, memory_gib=needed.total / 3))
    with pytest.raises(UserError, match=r"Write hardware\.per_device_batch_size=(16|8|4) \(") as refused:
        check_fits(room, lengths, forecast(room, lengths, on_gpu=False), on_gpu=False)
    rows = int(str(refused.value).split("per_device_batch_size=")[1].split(" ")[0])
    mended = replace(room, hardware=replace(room.hardware, per_device_batch_size=rows))
    check_fits(mended, lengths, forecast(mended, lengths, on_gpu=False), on_gpu=False)
    twice = replace(room, hardware=replace(room.hardware, per_device_batch_size=2 * rows))
    assert forecast(twice, lengths, on_gpu=False).total > needed.total / 3


def test_an_estimate_that_may_be_too_high_refuses_nothing() -> None:
    assert not Forecast({"weights": 1.1}, {}, 1.0).cannot_fit
    assert Forecast({"weights": 1.2}, {}, 1.0).cannot_fit
    assert not Forecast({"weights": 1.2}, {}, None).cannot_fit


@pytest.mark.long
def test_of_several_processes_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    run = checked("hardware.memory_gib=0.01")
    too_much = Forecast({"weights": 1.0}, {}, 0.01, "hardware.memory_gib")
    with pytest.raises(UserError, match="about 1.0 GiB"):
        check_fits(run, LENGTHS, too_much, on_gpu=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_fits(run, LENGTHS, too_much, on_gpu=False)


@pytest.mark.long
def test_check_prints_the_forecast_and_refuses(tmp_path: Path) -> None:
    line = ["check=true", "logger=none", "eval=none", "hardware=cpu"]
    outcome = command(line, tmp_path)
    assert outcome.code == 0
    assert "writing completions" in outcome.out and "learning" in outcome.out and "peak" in outcome.out
    outcome = command([*line, "hardware.memory_gib=0.3"], tmp_path)
    assert outcome.code == 2
    assert "This run needs about" in outcome.err and "hardware.memory_gib is 0.3 GiB" in outcome.err
    assert "take a smaller model" in outcome.err


@pytest.mark.long
def test_a_run_whose_weights_cannot_fit_is_refused_before_they_load(tmp_path: Path) -> None:
    outcome = command(["logger=none", "hardware=cpu", "model.name=embedded", "hardware.memory_gib=0.01"], tmp_path)
    assert outcome.code == 2 and "This run needs about" in outcome.err
    assert not any(name.endswith("metrics.jsonl") for name in outcome.left)
