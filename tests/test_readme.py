"""The training commands that the README shows compose and pass their checks, as they stand there."""

import re
import shlex

import pytest

from tests.command import command
from tests.reference import ROOT

COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    for line in block.splitlines()
    if line.startswith("python -m selfdistill.train")
]
REWARD = """
def brevity(prompts, completions, **columns):
    return [{"score": 1.0 / (1 + len(c[-1]["content"])), "feedback": "Be shorter."} for c in completions]
"""


def test_there_are_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("line", COMMANDS)
def test_it_is_accepted(line, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARD)
    (tmp_path / "my.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    monkeypatch.syspath_prepend(tmp_path)
    arguments = shlex.split(line)[3:]
    outcome = command([*arguments, "check=true"], tmp_path)
    assert outcome.code == 0, outcome.err
    assert not {name for name in outcome.left if name.startswith("outputs/2")}
