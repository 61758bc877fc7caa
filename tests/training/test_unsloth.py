"""Unsloth as a loader, as far as it can be told without unsloth; tests/unsloth holds it against the real one."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import trl
from omegaconf import OmegaConf

from selfdistill import UserError, config
from selfdistill.machine.packages import Facts
from selfdistill.runs import preflight
from selfdistill.training import unsloth
from tests.command import composed
from tests.reference import ROOT

ON_A_GPU = ["hardware=gpu_24gb", "model=qwen3_0_6b", "model.loader=unsloth"]


def run(*overrides: str, hardware: str = "gpu_24gb") -> config.Run:
    return config.check(composed([f"hardware={hardware}", *ON_A_GPU[1:], *overrides]))


def test_what_the_model_is_loaded_with() -> None:
    given = unsloth.loading_arguments(run("model.lora.r=16", "seed=7"))
    assert given == {
        "model_name": "Qwen/Qwen3-0.6B", "max_seq_length": 4096, "load_in_4bit": False, "load_in_16bit": True,
        "revision": None, "trust_remote_code": False, "use_gradient_checkpointing": "unsloth", "random_state": 7,
        "fast_inference": True, "gpu_memory_utilization": 0.3, "max_lora_rank": 16,
    }  # fmt: skip
    alone = unsloth.loading_arguments(run("model.load_in_4bit=true", "model.dtype=bfloat16", hardware="gpu_16gb"))
    assert (alone["load_in_4bit"], alone["load_in_16bit"], alone["dtype"]) == (True, False, torch.bfloat16)
    assert alone["fast_inference"] is False
    assert not {"gpu_memory_utilization", "max_lora_rank"} & alone.keys()


def test_what_the_adapter_is_made_of() -> None:
    given = unsloth.adapter_arguments(run("model.lora={r: 4, alpha: 8, dropout: 0.1}"))
    assert (given["r"], given["lora_alpha"], given["lora_dropout"]) == (4, 8, 0.1)
    assert "down_proj" in given["target_modules"] and len(given["target_modules"]) == 7
    assert unsloth.adapter_arguments(run("model.lora.target_modules=[q_proj]"))["target_modules"] == ["q_proj"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.tuning=full"], "model.tuning=lora"),
        (["model.adapter_path=x"], "model.adapter_path"),
        (["sequence=skills"], "tasks: .*model.loader=transformers"),
        (["model.revision=v2"], "model.revision='v2': unsloth does not read it"),
        (["hardware.vllm.tensor_parallel_size=2"], "hardware.vllm.tensor_parallel_size=2: unsloth does not read it"),
        (["hardware.vllm.max_model_tokens=3000"], "hardware.vllm.max_model_tokens=3000: .*model.max_seq_tokens=3000"),
        (["hardware.vllm.mode=server", "hardware.vllm.server_base_url=http://x"], "hardware.vllm.mode=colocate"),
    ],
)
def test_combinations_that_it_has_no_part_in(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(*overrides)


def test_a_revision_is_loaded_where_no_engine_loads_the_weights() -> None:
    alone = run("model.revision=v2", "hardware.vllm.mode=null")
    assert unsloth.loading_arguments(alone)["revision"] == "v2"


@pytest.mark.parametrize(
    ("is_here", "words"), [(False, "is not installed"), (True, "needs a GPU, and torch sees none")]
)
def test_it_is_refused_with_a_reason(is_here: bool, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsloth, "find_spec", lambda name: name if is_here else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"{words}.*model.loader=transformers"):
        unsloth.import_unsloth()


def test_versions_that_do_not_go_together_are_refused() -> None:
    together = {"unsloth": "2026.10.7", "trl": "1.14.2", "transformers": "5.17.0", "datasets": "4.8.5"}
    unsloth.check_versions(Facts(together, gpu=True))
    with pytest.raises(UserError, match=r"patches trl up to.*trl==1\.14\.2"):
        unsloth.check_versions(Facts(together | {"trl": "1.16.0"}, gpu=True))


def test_its_environment_stands_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.delenv("UNSLOTH_VLLM_STANDBY", raising=False)
    monkeypatch.setattr(preflight.os, "environ", dict(os.environ))
    monkeypatch.setattr(preflight, "import_unsloth", lambda: seen.append(os.environ.get("UNSLOTH_VLLM_STANDBY")))
    preflight.prepare_imports(composed(ON_A_GPU))
    assert seen == ["1"]
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    preflight.prepare_imports(composed())
    preflight.prepare_imports(OmegaConf.create({}))  # an old run's configuration
    assert len(seen) == 1


def test_nothing_that_it_changes_is_imported_before_it() -> None:
    program = (
        "import sys; import selfdistill.train; print(*{'trl', 'transformers', 'peft', 'torch'} & sys.modules.keys())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_nothing_that_it_changes_is_imported_before_it_in_the_jobs_of_a_sweep(tmp_path: Path) -> None:
    """They are forks of the process that has checked them."""
    program = """
import sys
from selfdistill import UserError, train
from selfdistill.runs import preflight

def seen():
    raise UserError(f"before it: {sorted({'trl', 'transformers', 'peft'} & sys.modules.keys())}")

preflight.import_unsloth = seen
train.main()
"""
    keys = ["model.loader=unsloth", "model.tuning=lora", "experiment=sdpo", "hydra.sweep.dir=sweep", "seed=0,1"]
    done = subprocess.run(
        [sys.executable, "-c", program, "--multirun", *keys],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    jobs = [json.loads(line) for line in (tmp_path / "sweep" / "jobs.jsonl").read_text().splitlines()]
    assert [job["message"] for job in jobs if job["status"] == "failed"] == ["before it: []"] * 2, jobs


def test_it_is_not_imported_after_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsloth, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(unsloth, "check_versions", lambda facts: None)
    with pytest.raises(UserError, match="before TRL.*on the command line"):
        unsloth.import_unsloth()


def test_trls_own_trainer_stands_beneath_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where unsloth has put its own classes, TRL's are put back as TRL wrote them."""
    places: list[Any] = [trl, trl.trainer]
    modules = {
        kind: importlib.import_module(f"trl.trainer.grpo_{kind.lower()[4:]}") for kind in ("GRPOConfig", "GRPOTrainer")
    }
    for kind, module in modules.items():
        theirs = type(f"Unsloth{kind}", (vars(module)[kind],), {"__module__": "unsloth_compiled"})
        for place in (*places, module):
            monkeypatch.setattr(place, kind, theirs)
    unsloth.put_trl_back()
    assert trl.GRPOTrainer.__module__ == "unsloth_compiled"  # unsloth was not imported: somebody else's doing
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    unsloth.put_trl_back()
    for kind, module in modules.items():
        assert {vars(place)[kind] for place in (*places, module)} == {vars(module)[kind]}
        assert vars(module)[kind].__module__ == module.__name__
    assert modules["GRPOTrainer"].GRPOConfig is trl.GRPOConfig
