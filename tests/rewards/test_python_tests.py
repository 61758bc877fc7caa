import os

import pytest

from selfdistill.errors import UserError
from selfdistill.rewards import PythonTests
from selfdistill.rewards.python_tests import extract_code

DOUBLE = "def f(x):\n    return 2 * x\n"


def judge(code, tests, **arguments):
    reward = PythonTests(allow_code_execution=True, **{"timeout_s": 5.0, "workers": 1, **arguments})
    return reward(prompts=["q"], completions=[code], tests=[tests])[0]


def test_it_is_off_unless_allowed():
    for arguments in ({}, {"allow_code_execution": False}):
        with pytest.raises(UserError, match="allow_code_execution=true"):
            PythonTests(**arguments)


def test_passing_and_failing():
    assert judge(DOUBLE, ["assert f(2) == 4", "assert f(0) == 0"]) == {"score": 1.0, "feedback": None}
    found = judge(DOUBLE, ["assert f(2) == 4", "assert f(2) == 5"])
    assert found == {"score": 0.0, "feedback": "1 of 2 tests fail.\n\nassert f(2) == 5\nf(2) gave 4"}
    assert judge(DOUBLE, ["assert f(2) == 4", "assert f(2) == 5"], partial=True, feedback="none") == 0.5
    assert judge(DOUBLE, "assert f(2) == 4", feedback="none") == 1.0
    assert judge(DOUBLE, [], feedback="none") is None
    assert judge(DOUBLE, None) is None


def test_code_is_taken_from_the_last_fence():
    text = f"First:\n```python\ndef f(x): return 0\n```\nBetter:\n```py\n{DOUBLE}```\nDone."
    assert extract_code(text) == DOUBLE.strip("\n")
    assert judge(text, ["assert f(2) == 4"])["score"] == 1.0
    assert extract_code(f"```python\n{DOUBLE}") == DOUBLE.strip("\n")


def test_errors_come_before_timeouts_before_wrong_results():
    code = "def f(x):\n    if x == 1: return 1 / 0\n    while x == 2: pass\n    return x\n"
    tests = ["assert f(5) == 6", "assert f(4) == 5, 'four'", "assert f(1) == 1", "assert f(2) == 2"]
    told = judge(code, tests, timeout_s=2.0)["feedback"]
    head, first, second = told.split("\n\n")
    assert head == "4 of 4 tests fail."
    assert first == "assert f(1) == 1\nZeroDivisionError: division by zero (line 2, in f)"
    assert second == "assert f(2) == 2\nThe time limit was exceeded."


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def f(:\n  pass", "The code is not valid Python: invalid syntax (line 1)."),
        ("import nothing_like_this", "ModuleNotFoundError: No module named 'nothing_like_this' (line 1, in <module>)"),
        ("while True: pass", "The time limit was exceeded before any test."),
        ("import sys; sys.exit(0)", "SystemExit: 0 (line 1, in <module>)"),
        ("import os\ndef f(x): os._exit(0)", "The process ended before the test did."),
        ("", "The response holds no code."),
    ],
)
def test_code_that_cannot_run_is_described_once(code, told):
    found = judge(code, ["assert f(1) == 1", "assert f(2) == 2"], timeout_s=1.0)
    assert found["score"] == 0.0
    # What happened in the middle of a test is told for each of the two, what kept them all from running once.
    assert found["feedback"].count(told) == (2 if "ended before" in told else 1)
    assert found["feedback"].startswith("2 of 2 tests fail.")


def test_a_loop_that_swallows_exceptions_ends_too():
    code = "def f(x):\n    while True:\n        try:\n            while True: pass\n        except Exception: pass\n"
    assert judge(code, ["assert f(1) == 1"], timeout_s=1.0)["feedback"].endswith("The time limit was exceeded.")


def test_memory_is_limited():
    found = judge("x = bytearray(10**9)", ["assert True"], memory_mib=256)
    assert found["score"] == 0.0
    assert "MemoryError" in found["feedback"]


@pytest.mark.parametrize(
    "attempt",
    [
        "open({outside!r}, 'w')",
        "import os; os.open({outside!r}, os.O_WRONLY | os.O_CREAT)",
        "import pathlib; pathlib.Path({outside!r}).mkdir()",
        "import os; os.remove({victim!r})",
        "import os; os.rename({victim!r}, 'here')",
        "import os; os.symlink({victim!r}, 'link'); open('link', 'w')",
        "import shutil; shutil.rmtree({folder!r})",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os, signal; os.kill(os.getppid(), signal.SIGTERM)",
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
    ],
)
def test_accidents_are_refused(attempt, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    code = attempt.format(outside=str(tmp_path / "stray"), victim=str(victim), folder=str(tmp_path))
    found = judge(code, ["assert True"])
    assert found["score"] == 0.0
    assert "not allowed" in found["feedback"] or "outside the working folder" in found["feedback"]
    assert victim.read_text() == "kept"
    assert os.listdir(tmp_path) == ["victim"]


def test_the_working_folder_can_be_used_and_files_are_bounded():
    code = "open('note', 'w').write('hello')\ndef f():\n    return open('note').read()\n"
    assert judge(code, ["assert f() == 'hello'"])["score"] == 1.0
    big = "def f():\n    with open('big', 'wb') as file:\n        file.write(b'x' * 3 * 2**20)\n"
    assert "OSError" in judge(big, ["f()"])["feedback"]


def test_the_environment_is_empty_and_output_is_ignored(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    code = "import os\nprint('{\"kind\": \"ok\"}' * 100)\nassert 'SECRET_TOKEN' not in os.environ\ndef f(): return 1\n"
    assert judge(code, ["assert f() == 1"])["score"] == 1.0


def test_feedback_is_bounded():
    tests = [f"assert f('{'y' * 900}') == '{n}'" for n in range(4)]
    told = judge("def f(x):\n    raise ValueError('z' * 10000)", tests)["feedback"]
    assert len(told) <= 2000
    assert told.startswith("4 of 4 tests fail.")


def test_a_batch_keeps_its_order():
    reward = PythonTests(allow_code_execution=True, workers=2, feedback="none")
    codes = [f"def f(): return {n}" for n in range(6)]
    found = reward(prompts=["q"] * 6, completions=codes, tests=[["assert f() % 2 == 0"]] * 6)
    assert found == [1.0, 0.0] * 3


def test_wrong_columns_and_settings():
    with pytest.raises(UserError, match=r"'tests'.*reward.tests_field"):
        PythonTests(allow_code_execution=True)(prompts=["q"], completions=["x"])
    with pytest.raises(UserError, match=r"row 0 .*'tests'.*3"):
        judge(DOUBLE, [3])
    with pytest.raises(UserError, match=r"reward.timeout_s"):
        PythonTests(allow_code_execution=True, timeout_s=0.0)


IGNORES_THE_ALARM = "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\n"


@pytest.mark.parametrize("namespaces", [True, False])
def test_code_that_ignores_the_alarm_is_killed_and_earlier_results_kept(namespaces, monkeypatch):
    monkeypatch.setattr("selfdistill.rewards.python_tests.START_GRACE_S", 4.0)
    if not namespaces:
        monkeypatch.setattr("selfdistill.rewards.python_tests._without_network", lambda: ())
    waits = ["while True: pass", "time.sleep(60)"]
    codes = [f"{IGNORES_THE_ALARM}def f(x):\n    if x:\n        {wait}\n" for wait in waits]
    reward = PythonTests(allow_code_execution=True, timeout_s=2.0, partial=True, workers=2)
    busy, asleep = reward(prompts=["q"] * 2, completions=codes, tests=[["assert f(0) is None", "f(1)"]] * 2)
    assert (busy["score"], asleep["score"]) == (0.5, 0.5)
    assert asleep["feedback"] == "1 of 2 tests fail.\n\nf(1)\nThe time limit was exceeded."
    # A busy loop can meet the limit on processor time first, which the system enforces.
    died = asleep["feedback"].replace("The time limit was exceeded.", "The process ended before the test did.")
    assert busy["feedback"] in (asleep["feedback"], died)
