"""What a command says when it is refused."""

from pathlib import Path

import pytest

from selfdistill.config import messages
from tests.command import command


def test_of_several_processes_the_first_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for process, alone, wait in (("0", False, []), ("1", True, []), ("1", False, [messages.FIRST_SAYS_S])):
        monkeypatch.setenv("RANK", process)
        waited.clear()
        assert (messages.fail("no", alone=alone), waited) == (2, wait)
        assert capsys.readouterr().err == "selfdistill: no\n"


def test_a_sweeper_that_is_not_installed_names_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hydra/sweeper=optuna" in messages.SWEEP_EXTRA
    monkeypatch.setattr(messages, "SWEEP_EXTRA", ("hydra/sweeper=absent",))  # optuna itself may be installed here
    outcome = command(["--multirun", "hydra/sweeper=absent", "seed=1,2"], tmp_path)
    assert (outcome.code, outcome.left) == (2, set())
    assert outcome.err == (
        "selfdistill: hydra/sweeper=absent is not installed: pip install 'selfdistill[sweep]' brings it.\n"
    )
