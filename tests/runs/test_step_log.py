"""The log of steps under faults: kills in the middle of a write, full disks, and files that are gone."""

import errno
import os
from pathlib import Path

import pytest

from selfdistill.errors import UserError
from selfdistill.runs.step_log import StepLog

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def log(tmp_path: Path) -> StepLog:
    log = StepLog(tmp_path / "metrics.jsonl", write=True)
    log.append({"step": 1, "reward": 0.5})
    log.append({"step": 2, "reward": 0.25})
    yield log
    log.close()


def reopened(log: StepLog) -> list[dict]:
    log.close()
    again = StepLog(log.path, write=True)
    again.append({"step": 3})
    again.close()
    assert not [path for path in log.path.parent.iterdir() if path != log.path]
    return again.read()[:-1]


def full_after(log: StepLog, monkeypatch: pytest.MonkeyPatch, bytes_left: int) -> None:
    """From now on the disk takes so many bytes, and of a longer write a part, as a real one does."""
    left, real = [bytes_left], os.pwrite

    def pwrite(file: int, content: bytes, offset: int) -> int:
        if offset + len(content) <= log.path.stat().st_size:
            return real(file, content, offset)  # in the place of what was there
        if not left[0]:
            raise NO_SPACE
        taken = min(left[0], len(content))
        left[0] -= taken
        return real(file, content[:taken], offset)

    monkeypatch.setattr("selfdistill.files.os.pwrite", pwrite)


def test_a_full_disk_tears_no_line(log: StepLog, monkeypatch: pytest.MonkeyPatch) -> None:
    before = log.path.read_bytes()
    with monkeypatch.context() as patch:
        full_after(log, patch, 10)
        with pytest.raises(OSError, match="No space left"):
            log.append({"step": 3, "reward": 0.125})
    assert log.path.read_bytes() == before
    assert [line["step"] for line in reopened(log)] == [1, 2]


def test_a_disk_that_takes_a_part_of_a_line_is_given_the_rest(log: StepLog, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr("selfdistill.files.os.pwrite", lambda file, b, offset: real(file, b[:7], offset))
    log.append({"step": 3, "reward": 0.125})
    assert log.read()[-1] == {"step": 3, "reward": 0.125}


def test_a_full_disk_leaves_the_line_that_was_to_be_replaced(log: StepLog, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("selfdistill.runs.step_log.write_atomically", lambda *_: None)
        (log.path.parent / ".metrics.jsonl.last-line").touch()
        full_after(log, patch, 5)
        with pytest.raises(OSError, match="No space left"):
            log.merge(2, {"eval/accuracy": 1.0})
    (log.path.parent / ".metrics.jsonl.last-line").unlink()
    assert reopened(log) == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.25}]


@pytest.mark.parametrize("written", range(0, 40, 3))
def test_a_kill_while_the_last_line_is_replaced_loses_nothing(
    written: int, log: StepLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(file: int, content: bytes, offset: int) -> None:
        os.pwrite(file, content[:written], offset)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("selfdistill.runs.step_log.write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            log.merge(2, {"eval/accuracy": 1.0})
    assert reopened(log)[1] == {"step": 2, "reward": 0.25, "eval/accuracy": 1.0}


@pytest.mark.parametrize("torn", [b'{"step": 2, "rew\n', b'{"step": 2, "rew', b"\x00\x00\n"])
def test_a_line_torn_by_an_earlier_fault_is_left_out(torn: bytes, log: StepLog) -> None:
    log.close()
    log.path.write_bytes(b'{"step": 1}\n' + torn + b'{"step": 4, "reward": 4.0}\n')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 2, was torn by an earlier fault"):
        again = StepLog(log.path, write=True)
    again.merge(4, {"more": 1})
    again.close()
    assert again.read() == [{"step": 1}, {"step": 4, "reward": 4.0, "more": 1}]


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_log_that_is_gone_is_said(how: str, log: StepLog) -> None:
    if how == "moved":
        log.path.rename(log.path.with_name("elsewhere"))
    else:
        log.path.unlink()
    if how == "replaced":
        log.path.write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl is gone: it was deleted or moved while"):
        log.append({"step": 3})
