import io
import logging
import sys
import warnings

import pytest

from selfdistill.config.messages import fail
from selfdistill.runs.console import samples_table
from selfdistill.runs.screen import Screen, heard
from selfdistill.text import escaped

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202etxt\ud800 bell\x07 \r over"


def test_the_log_has_what_was_on_the_screen_without_colours(tmp_path):
    screen = Screen(file=io.StringIO(), width=80, force_terminal=True)
    screen.print("before")
    screen.keep(tmp_path / "log.txt")
    screen.print("[bold]in [red]colour")
    screen.print_line("x" * 100)
    screen.note("for the log alone")
    screen.close()
    again = Screen(file=io.StringIO(), width=80)
    again.keep(tmp_path / "log.txt")
    again.print("a resumed run")
    again.close()
    assert "\x1b" in screen.file.getvalue()
    assert "alone" not in screen.file.getvalue()
    assert (tmp_path / "log.txt").read_text().splitlines() == [
        "in colour", "x" * 100, "for the log alone", "a resumed run",
    ]  # fmt: skip


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path):
    screen = Screen(file=io.StringIO())
    screen.keep(tmp_path / "absent" / "log.txt")
    screen.print("said")
    screen.note("unsaid")
    screen.close()
    assert screen.file.getvalue() == "said\n"


def test_completions_command_no_terminal(tmp_path):
    screen = Screen(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), width=100)
    screen.keep(tmp_path / "log.txt")
    screen.print(samples_table(1, [{"prompt": HOSTILE, "completion": HOSTILE, "feedback": HOSTILE, "reward": 0.0}]))
    screen.note(HOSTILE)
    screen.close()
    screen.file.flush()
    for text in (screen.file.buffer.getvalue().decode(), (tmp_path / "log.txt").read_text()):
        assert not any(character in text for character in "\x1b\x07\x9b\u202e\ud800\r")
        assert "\\x1b[2J" in text


def test_printable_leaves_words_alone():
    assert escaped("größer\t日本語 👩‍💻\nnext") == "größer\t日本語 👩‍💻\nnext"
    assert escaped("\x00\x7f") == "\\x00\\x7f"


def test_a_message_that_quotes_a_completion_commands_no_terminal(capsys):
    assert fail(f"the reward broke on {HOSTILE}") == 2
    assert capsys.readouterr().err.startswith("selfdistill: the reward broke on \\x1b[2J")


@pytest.fixture
def hub():
    """A library's logger that prints through a handler of its own."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers, logger.propagate = [logging.StreamHandler(sys.stderr)], False
    logger.setLevel(logging.WARNING)
    yield logger
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def test_what_libraries_log_takes_a_line_once_and_stands_in_the_log(tmp_path, capsys, hub):
    screen = Screen(file=io.StringIO())
    screen.keep(tmp_path / "log.txt")
    own = hub.handlers[:]
    with heard(screen):
        for attempt in range(3):
            hub.warning(f"retry {attempt}\n{'long ' * 100}")
        logging.getLogger("anything.else").warning("number %d", 7)
    screen.close()
    assert hub.handlers == own
    assert len(err := capsys.readouterr().err.splitlines()) == 2
    assert err[0].startswith("warning: huggingface_hub: retry 0 long") and len(err[0]) <= 210
    assert err[1] == "warning: anything.else: number 7"
    log = (tmp_path / "log.txt").read_text()
    assert [f"retry {attempt}" in log for attempt in range(3)] == [True] * 3


def test_warnings_take_a_line_once_and_deprecations_none(tmp_path):
    """What Python would print; pytest itself collects warnings before that."""
    screen = Screen(file=io.StringIO())
    screen.keep(tmp_path / "log.txt")
    with heard(screen):
        said = [warnings.formatwarning(UserWarning(f"it\nis {i}"), UserWarning, "lib.py", 3) for i in range(3)]
        said.append(warnings.formatwarning(DeprecationWarning("old"), DeprecationWarning, "lib.py", 4))
    screen.close()
    assert said == ["warning: it is 0\n", "", "", ""]
    log = (tmp_path / "log.txt").read_text()
    assert all(part in log for part in ("is 1", "is 2", "lib.py:4: DeprecationWarning: old"))
    assert warnings.formatwarning.__module__ == "warnings"
