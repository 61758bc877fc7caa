"""A reward that a user adds: one class in a file of theirs, with settings, and no other file."""

import json
from pathlib import Path

import pytest

from tests.command import command

BREVITY = """
from dataclasses import dataclass

from selfdistill.rewards import Reward


@dataclass(eq=False)
class Brevity(Reward):
    most_tokens: int = 32

    def __call__(self, prompts, completions, completion_ids, **columns):
        return [-max(0.0, len(ids) / self.most_tokens - 1) for ids in completion_ids]
"""
LINE = [
    "reward=function", "reward._target_=own_rewards.Brevity", "reward._partial_=false",
    "trusted_prefixes=[own_rewards]", "dry_run=true", "logger=none", "eval=none", "hardware=cpu",
    "hardware.per_device_batch_size=4", "hardware.accumulation_steps=1", "num_generations=2",
    "rollout.max_completion_tokens=8",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_rewards.py").write_text(BREVITY)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_class_of_ones_own_is_used_with_its_settings(folder: Path) -> None:
    done = command([*LINE, "+reward.most_tokens=4", f"output_dir={folder}"], folder)
    assert done.code == 0, done.err
    (run,) = (path.parent for path in folder.glob("*/metrics.jsonl"))
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert -1.0 <= step["rewards/brevity/mean"] < 0.0


def test_its_settings_are_checked(folder: Path) -> None:
    done = command([*LINE, "+reward.most_token=4"], folder)
    assert done.code == 2
    assert "reward.most_token: own_rewards.Brevity takes no such argument; did you mean most_tokens?" in done.err
