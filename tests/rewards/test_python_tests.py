import base64
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from selfdistill.errors import UserError
from selfdistill.rewards import PythonTests, sandbox
from selfdistill.rewards.python_tests import extract_code
from tests.rewards.attacks import ATTACKS, INNOCENT

CONFINED = pytest.mark.skipif(isinstance(sandbox.bubblewrap(), str), reason=str(sandbox.bubblewrap()))
# Where the system forbids namespaces, the rest is tried in a bare process.
BEST = "unsandboxed" if isinstance(sandbox.bubblewrap(), str) else True

DOUBLE = "def f(x):\n    return 2 * x\n"


def judge(code, tests, **arguments):
    reward = PythonTests(**{"allow_code_execution": BEST, "timeout_s": 10.0, "workers": 1, **arguments})
    return reward(prompts=["q"], completions=[code], tests=[tests])[0]


def test_it_is_off_unless_allowed():
    for arguments in ({}, {"allow_code_execution": False}, {"allow_code_execution": "yes"}):
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
        "import os; os.remove('victim', dir_fd=os.open({folder!r}, os.O_RDONLY))",
        "import sqlite3; sqlite3.connect({outside!r})",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
    ],
)
def test_accidents_are_refused_without_a_sandbox(attempt, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    code = attempt.format(outside=str(tmp_path / "stray"), victim=str(victim), folder=str(tmp_path))
    found = judge(code, ["assert True"], allow_code_execution="unsandboxed")
    assert found["score"] == 0.0
    assert "not allowed" in found["feedback"] or "outside the working folder" in found["feedback"]
    assert victim.read_text() == "kept"
    assert os.listdir(tmp_path) == ["victim"]


def test_the_working_folder_can_be_used_and_files_are_bounded():
    code = "open('note', 'w').write('hello')\ndef f():\n    return open('note').read()\n"
    assert judge(code, ["assert f() == 'hello'"])["score"] == 1.0
    big = "def f():\n    with open('big', 'wb') as file:\n        file.write(b'x' * 3 * 2**20)\n"
    assert "OSError" in judge(big, ["f()"])["feedback"]


@CONFINED
@pytest.mark.parametrize("name", ["numpy", "a class", "an argument that is changed"])
def test_innocent_code_passes(name):
    code, test = INNOCENT[name]
    assert judge(code, [test]) == {"score": 1.0, "feedback": None}


@pytest.mark.long
@pytest.mark.parametrize("allowed", [pytest.param(True, marks=CONFINED), "unsandboxed"])
@pytest.mark.parametrize("name", INNOCENT)
def test_all_innocent_code_passes(name, allowed):
    code, test = INNOCENT[name]
    assert judge(code, [test], allow_code_execution=allowed) == {"score": 1.0, "feedback": None}


def fails(attack, allowed, tmp_path, monkeypatch):
    """Makes the attack; says whether it got a full score or did harm outside."""
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    victim = tmp_path / "victim"
    victim.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        names = {"victim": str(victim), "folder": str(tmp_path), "pid": os.getpid(), "port": port}
        code = attack.code.format(**names) if "{{" in attack.code or attack.kind != "hack" else attack.code
        found = judge(code, list(attack.tests), allow_code_execution=allowed, timeout_s=3.0)
    found["feedback"].encode()  # no lone surrogate
    return found["score"] == 0.0 and os.listdir(tmp_path) == ["victim"] and victim.read_text() == "kept"


ONE_OF_EACH = {
    "the environment of any process", "a connection by native code", "open below a descriptor", "unittest's ANY",
    "many lines of tests that have passed", "a surrogate in an exception", "a false module",
}  # fmt: skip


@CONFINED
@pytest.mark.parametrize(
    "attack",
    [pytest.param(one, marks=() if one.name in ONE_OF_EACH else pytest.mark.long, id=one.name) for one in ATTACKS],
)
def test_an_attack_fails_in_the_sandbox(attack, tmp_path, monkeypatch):
    assert fails(attack, True, tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("attack", [pytest.param(o, id=o.name) for o in ATTACKS if o.kind in ("results", "hack")])
def test_verdicts_cannot_be_forged_without_a_sandbox(attack, tmp_path, monkeypatch):
    assert fails(attack, "unsandboxed", tmp_path, monkeypatch)


def test_without_bubblewrap_the_reward_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "find_bubblewrap", lambda: None)
    sandbox.bubblewrap.cache_clear()
    with pytest.raises(UserError, match=r"bubblewrap is not installed.*sandbox_url.*unsandboxed"):
        PythonTests(allow_code_execution=True)
    sandbox.bubblewrap.cache_clear()


class SandboxFusion(BaseHTTPRequestHandler):
    """Speaks SandboxFusion's API, and runs the code in a process of its own. The first request is turned away."""

    busy = True

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if type(self).busy:
            type(self).busy = False
            self.send_error(503)
            return
        folder = self.server.folder
        for name, content in request["files"].items():
            (folder / name).write_bytes(base64.b64decode(content))
        done = subprocess.run(
            [sys.executable, "-c", request["code"]],
            input=request["stdin"],
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=request["run_timeout"],
        )
        result = {"status": "Finished", "return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        answer = json.dumps({"status": "Success", "message": "", "run_result": result}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def test_a_server_with_the_api_of_sandbox_fusion(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), SandboxFusion)
    server.folder = tmp_path
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://user:password@127.0.0.1:{server.server_port}"
        assert "password" not in sandbox.Server(url).name
        found = judge(DOUBLE, ["assert f(2) == 4", "assert f(2) == 5"], sandbox_url=url, allow_code_execution=True)
    finally:
        server.shutdown()
        server.server_close()
    assert found == {"score": 0.0, "feedback": "1 of 2 tests fail.\n\nassert f(2) == 5\nf(2) gave 4"}


def test_a_server_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"reward.sandbox_url: the server http://127.0.0.1:9 does not run code"):
        sandbox.Server("http://127.0.0.1:9", patience_s=0.0).run(sandbox.Task(DOUBLE, ["f(1)"], 1.0, 512, 1, 8))


def test_feedback_is_bounded():
    tests = [f"assert f('{'y' * 900}') == '{n}'" for n in range(4)]
    told = judge("def f(x):\n    raise ValueError('z' * 10000)", tests)["feedback"]
    assert len(told) <= 2000
    assert told.startswith("4 of 4 tests fail.")


def test_a_batch_keeps_its_order():
    reward = PythonTests(allow_code_execution=BEST, workers=2, feedback="none")
    codes = [f"def f(): return {n}" for n in range(6)]
    found = reward(prompts=["q"] * 6, completions=codes, tests=[["assert f() % 2 == 0"]] * 6)
    assert found == [1.0, 0.0] * 3


def test_wrong_columns_and_settings():
    with pytest.raises(UserError, match=r"'tests'.*reward.tests_field"):
        PythonTests(allow_code_execution=BEST)(prompts=["q"], completions=["x"])
    with pytest.raises(UserError, match=r"row 0 .*'tests'.*3"):
        judge(DOUBLE, [3])
    with pytest.raises(UserError, match=r"reward.timeout_s"):
        PythonTests(allow_code_execution=BEST, timeout_s=0.0)


@pytest.mark.parametrize("allowed", [pytest.param(True, marks=CONFINED), "unsandboxed"])
def test_code_that_ignores_signals_is_ended_and_earlier_results_kept(allowed):
    code = "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ndef f(x):\n    if x: time.sleep(60)\n"
    tests = ["assert f(0) is None", "f(1)"]
    found = judge(code, tests, allow_code_execution=allowed, timeout_s=2.0, partial=True)
    assert found == {"score": 0.5, "feedback": "1 of 2 tests fail.\n\nf(1)\nThe time limit was exceeded."}
