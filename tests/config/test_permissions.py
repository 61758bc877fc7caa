"""What somebody else's folder asks for, door by door: nothing of it is granted before it is typed anew."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

from selfdistill import config, export, train
from selfdistill.config.permissions import asked_for, resume_command
from tests.command import command, composed

# How a folder's configuration was composed, and what must be typed for it.
ASKING = {
    "trusted_prefixes": (["trusted_prefixes=[os]"], "trusted_prefixes=[os]"),
    "code": (["allow_code_execution=true"], "allow_code_execution=true"),
    "model": (["model.trust_remote_code=true"], "model.trust_remote_code=true"),
    "arguments": (["+training.arguments.trust_remote_code=true"], "++training.arguments.trust_remote_code=true"),
    "llama.cpp": (["export=gguf", "export.llama_cpp=Evil"], "++export.llama_cpp=Evil"),
    "format": (
        ["export=gguf", "export.formats.gguf.llama_cpp=Evil"],
        "++export.formats.gguf.llama_cpp=Evil",
    ),
    "reward": (["reward=python_tests", "reward.allow_code_execution=true"], "++reward.allow_code_execution=true"),
}
NOT_BESIDE = ["beta=-1"]  # what is refused after the grants, so that nothing is trained here


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").touch()
    (folder / "summary.json").write_text('{"run_id": "old", "status": "interrupted"}')
    return folder


def write(folder: Path, written: list[str]) -> None:
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(composed([*written, *NOT_BESIDE]), resolve=True))


def refused(door: ModuleType, line: list[str], folder: Path, words: str) -> None:
    outcome = command(line, folder.parent, door)
    assert (outcome.code, outcome.left) == (2, set())
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert words in outcome.err


@pytest.mark.parametrize("door", ["resume", "repeat"])
@pytest.mark.parametrize("asking", ASKING)
def test_a_run_is_granted_nothing_by_its_folder(door: str, asking: str, old: Path) -> None:
    written, grant = ASKING[asking]
    write(old, written)
    refused(train, [f"{door}=old"], old, f"code that is not ours. If you know where the folder comes from, add {grant}")
    refused(train, [f"{door}=old", grant], old, "beta=-1 is out of range")


def test_another_value_grants_nothing(old: Path) -> None:
    write(old, ["trusted_prefixes=[a]"])
    refused(train, ["resume=old", "trusted_prefixes=[b]"], old, "its config.yaml has trusted_prefixes=[a]")


def test_what_repeats_a_grant_is_granted_with_it() -> None:
    line = ["reward=python_tests", "allow_code_execution=true", "export=gguf", "export.llama_cpp=here"]
    assert asked_for(composed(line)) == {"allow_code_execution": True, "export.llama_cpp": "here"}


def test_the_command_that_continues_grants_all_that_is_asked_for() -> None:
    line = ["reward=python_tests", "allow_code_execution=unsandboxed", "export=gguf", "export.llama_cpp=a folder"]
    run = config.check(composed([*line, "trusted_prefixes=[a,b]", "+training.arguments.trust_remote_code=true"]))
    assert resume_command(run, Path("out/run")) == (
        "python -m selfdistill.train resume=out/run allow_code_execution=unsandboxed 'trusted_prefixes=[a,b]' "
        "++training.arguments.trust_remote_code=true '++export.llama_cpp=a folder'"
    )


def test_an_export_loads_no_code_of_the_models_unasked(old: Path) -> None:
    write(old, ["model.trust_remote_code=true"])
    line = ["run=old", "export=gguf", "export.llama_cpp=absent"]
    refused(export, line, old, "run=old: its config.yaml has model.trust_remote_code=true, which lets it run code")
    refused(export, [*line, "model.trust_remote_code=true"], old, "export.llama_cpp=absent: there is no such folder")


@pytest.mark.parametrize("sweeper", ["basic", "params"])
def test_a_sweep_is_granted_nothing_by_its_files(sweeper: str, tmp_path: Path) -> None:
    """Neither by an experiment that its command line names, nor by the values that a sweep of its own sweeps."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\nallow_code_execution: true\n")
    (tmp_path / "mine" / "sweep").mkdir()
    params = "# @package _global_\nhydra: {sweeper: {params: {allow_code_execution: 'true'}}}\n"
    (tmp_path / "mine" / "sweep" / "own.yaml").write_text(params)
    (tmp_path / "sweep").mkdir()
    chosen = {"basic": "experiment=own", "params": "sweep=own"}[sweeper]
    arguments = ["--multirun", "--config-dir=mine", chosen, "seed=1,2", "hydra/launcher=processes"]
    plan = {"arguments": arguments, "folder": str(tmp_path), "adaptive": False}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(plan))
    words = "the configuration of one of its jobs has allow_code_execution=true"
    refused(train, ["resume_sweep=sweep"], tmp_path / "sweep", words)
