"""What a command says when it is refused."""

import pytest

from selfdistill.config import messages


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
