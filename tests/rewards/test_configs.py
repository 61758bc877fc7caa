"""Every shipped reward configuration builds, and writes down no default that differs from the class's."""

import inspect
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from selfdistill.config.conf import CONF
from selfdistill.errors import UserError

FOLDER = CONF / "reward"
# `function` is for a user to fill in, and `mix` is composed of others.
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem not in ("none", "function", "mix"))
# What a file sets on purpose: choices that are not the class's default.
DELIBERATE = {
    "python_tests": {"allow_code_execution"},
    "random": {"seed"},
    "inverse_loss_guarded": {"rewards", "weights"},
}


def load(path: Path):
    root = OmegaConf.create({"seed": 0, "allow_code_execution": "unsandboxed"})
    root.reward = OmegaConf.load(path)
    return root.reward


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_builds_and_says_what_it_is(path):
    assert path.read_text().startswith("# ")
    reward = instantiate(load(path), _convert_="all")  # as a run does
    assert callable(reward)
    assert isinstance(reward.__name__, str)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_values_are_the_defaults_of_the_class(path):
    config = load(path)
    parameters = inspect.signature(get_class(config._target_).__init__).parameters
    for key, value in config.items():
        if key != "_target_" and key not in DELIBERATE.get(path.stem, ()):
            assert parameters[key].default == value, key


def test_code_execution_follows_the_root_key():
    root = OmegaConf.create({"allow_code_execution": False})
    root.reward = OmegaConf.load(FOLDER / "python_tests.yaml")
    with pytest.raises(InstantiationException, match="allow_code_execution=true") as caught:
        instantiate(root.reward)
    assert isinstance(caught.value.__cause__, UserError)


def test_none_takes_the_reward_away():
    text = (FOLDER / "none.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    assert OmegaConf.create(text).reward is None
