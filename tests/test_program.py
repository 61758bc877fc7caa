"""`selfdistill COMMAND`, the program: its commands, and the completion that a shell asks it for."""

import os
import pty
import select
import stat
import sys
import time
import tomllib
from pathlib import Path

import pytest

import selfdistill
from selfdistill import __main__ as program
from tests.command import command
from tests.reference import ROOT


def test_it_lists_its_commands(tmp_path: Path) -> None:
    outcome = command(["--help"], tmp_path, program)
    assert (outcome.code, outcome.err) == (0, "")
    for name in ("train", "doctor", "export", "generate-data"):
        assert f"\n  {name} " in outcome.out
    assert command([], tmp_path, program).code == 2


def test_it_says_its_version(tmp_path: Path) -> None:
    assert command(["--version"], tmp_path, program).out.strip() == selfdistill.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["version"]["path"] == "selfdistill/__init__.py"
    assert project["project"]["scripts"] == {"selfdistill": "selfdistill.__main__:main"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", "trian is not a command: did you mean train?"),
        ("seed=1", "write selfdistill train"),
        ("train betta=1", "betta is not a key: did you mean beta?"),
        ("export run=nowhere", "export= is missing"),
    ],
)
def test_a_mistake_is_one_message(line: str, words: str, tmp_path: Path) -> None:
    outcome = command(line.split(), tmp_path, program)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert words in outcome.err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("selfdistill ", {"train", "doctor", "generate-data"}),
        ("selfdistill do", {"doctor"}),
        ("selfdistill train experiment=sdp", {"experiment=sdpo", "experiment=sdpo_feedback"}),
        ("selfdistill doctor hardw", {"hardware=", "hardware."}),
        ("selfdistill export for", {"force="}),
        ("selfdistill generate-data top", {"top_p=", "topics=", "topic_template="}),
        ("selfdistill nonsense ", set()),
    ],
)
def test_it_completes_commands_groups_and_keys(
    typed: str, offered: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_LINE", typed)
    outcome = command(["-sc", "query=bash"], tmp_path, program)
    assert (outcome.code, outcome.err) == (0, "")
    assert offered <= set(outcome.out.split())


@pytest.mark.long
def test_bash_completes_in_a_terminal(tmp_path: Path) -> None:
    """What a person types and sees: a prompt, half a word, the tabulator key."""
    script = tmp_path / "selfdistill"
    script.write_text(f"#!{sys.executable}\nfrom selfdistill.__main__ import main\nmain()\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "PS1": "$ "}
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
    try:
        _type(terminal, 'eval "$(selfdistill --shell-completion install=bash)"; echo rea""dy\n', until="ready")
        assert "selfdistill train" in _type(terminal, "selfdistill tra\t", until="train")
        assert "experiment=opsd" in _type(terminal, " experiment=ops\t", until="opsd")
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)


def _type(terminal: int, keys: str, until: str) -> str:
    """What the terminal shows after these keys, up to a word."""
    os.write(terminal, keys.encode())
    seen, end = "", time.monotonic() + 60
    while until not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    time.sleep(0.3)
    if select.select([terminal], [], [], 0.2)[0]:
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen
