"""A step has the completions that the method asks for, whatever fits into memory at once."""

import re
from collections.abc import Iterator

import pytest
from omegaconf import DictConfig

from selfdistill import config
from selfdistill.config.batch import Batch, batch_of
from selfdistill.errors import UserError
from tests.command import composed, options, sampled


def batch(*overrides: str) -> Batch:
    return batch_of(config.check(composed(overrides), overrides))


@pytest.mark.parametrize(
    ("overrides", "per_device", "accumulation_steps"),
    [
        ((), 32, 1),
        (("hardware=gpu_80gb",), 8, 4),
        (("hardware=gpu_16gb",), 1, 32),
        (("completions_per_step=8",), 8, 1),
        (("completions_per_step=64",), 32, 2),
        (("hardware.per_device_batch_size=64",), 32, 1),
        (("hardware.accumulation_steps=2",), 32, 2),
    ],
)
def test_passes_follow_from_completions(overrides: tuple[str, ...], per_device: int, accumulation_steps: int) -> None:
    assert batch(*overrides) == Batch(per_device, accumulation_steps, 1)


@pytest.mark.parametrize(
    ("overrides", "per_device", "accumulation_steps"),
    [((), 16, 1), (("hardware.per_device_batch_size=8",), 8, 2), (("hardware.accumulation_steps=1",), 32, 1)],
)
def test_processes_share_a_step(
    overrides: tuple[str, ...], per_device: int, accumulation_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert batch(*overrides) == Batch(per_device, accumulation_steps, 2)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("line", ["num_generations=7", "num_generations=5", "hardware.per_device_batch_size=3"])
def test_what_a_refusal_advises_passes(line: str, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError, match=r"write .*completions_per_step=\d+") as refusal:
        batch(line)
    completions = re.findall(r"completions_per_step=\d+", str(refusal.value))[-1]
    advised = batch(line, completions)
    assert f"completions_per_step={advised.completions}" == completions


@pytest.fixture(scope="module")
def models() -> dict[str, DictConfig]:
    names = {"local": ["model.name=my_model"]}
    return {option: composed([f"model={option}", *names.get(option, [])]).model for option in options("model")}


def _machines() -> Iterator[tuple[str, str]]:
    return ((experiment, hardware) for experiment in options("experiment") for hardware in options("hardware"))


@pytest.mark.parametrize(("experiment", "hardware"), sampled(_machines()))
def test_every_experiment_fits_every_machine_and_model(
    experiment: str, hardware: str, models: dict[str, DictConfig]
) -> None:
    """A method's step is the same on all of them."""
    overrides = [f"experiment={experiment}", f"hardware={hardware}"]
    overrides += ["teacher.weights.name=a/better-model"] if experiment == "gkd" else []
    cfg = composed(overrides)
    for model in models.values():
        cfg.model = model
        assert batch_of(config.check(cfg, overrides)).completions == 32
