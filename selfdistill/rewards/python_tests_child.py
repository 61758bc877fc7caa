"""Runs one completion's code and its tests. Started by `PythonTests` as a process of its own; imports nothing of ours.

Reads one JSON object (code, tests, limits) on stdin. Writes one JSON line per test to the original stdout as soon as
the test has ended, so that results remain where the process dies later.
"""

import ast
import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress

MESSAGE_CHARACTERS = 600
REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill",
    "os.killpg", "pty.spawn", "resource.setrlimit", "resource.prlimit", "webbrowser.",
)  # fmt: skip
# Event → how many of its leading arguments are paths that it changes.
CHANGES_PATHS = {
    "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1, "os.setxattr": 1, "os.removexattr": 1, "shutil.rmtree": 1,
}  # fmt: skip


class OutOfTime(BaseException):
    """Not an Exception, so that `except Exception` in the code under test does not swallow it."""


def refuse_accidents(folder: str) -> None:
    """From now on no sockets, no processes, no signals to others, and no file is changed outside the folder."""
    root, real, decode, written = os.path.realpath(folder), os.path.realpath, os.fsdecode, os.O_WRONLY | os.O_RDWR
    changing = written | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        paths = arguments[: CHANGES_PATHS.get(event, 0)]
        if event == "open":
            path, mode, flags = arguments
            changes = any(c in mode for c in "wax+") if isinstance(mode, str) else (flags or 0) & changing
            paths = (path,) if changes else ()
        for path in paths:
            if isinstance(path, int) or path is None:
                continue
            where = real(decode(path))
            if where != "/dev/null" and where != root and not where.startswith(root + os.sep):
                raise PermissionError(f"files outside the working folder cannot be changed: {where}")

    sys.addaudithook(hook)


def describe(error: BaseException) -> str:
    """The exception, and the line of the solution that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<solution>"]
    where = f" (line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"[:MESSAGE_CHARACTERS]


def what_came_out(test: str, namespace: dict) -> str:
    """For a failed `assert a == b` the value of a; an empty text for other tests."""
    body = ast.parse(test).body
    if len(body) != 1 or not isinstance(body[0], ast.Assert) or not isinstance(body[0].test, ast.Compare):
        return ""
    left = body[0].test.left
    value = eval(compile(ast.Expression(left), "<test>", "eval"), namespace)
    return f"{ast.unparse(left)} gave {value!r}"


def run(test: str, namespace: dict) -> tuple[str, str]:
    """The kind of result (ok, wrong, timeout, error) and what to say about it."""
    text = ""
    try:
        try:
            exec(compile(test, "<test>", "exec"), namespace)
            return "ok", ""
        except AssertionError as error:
            with suppress(Exception):
                text = str(error) or what_came_out(test, namespace)
            return "wrong", text[:MESSAGE_CHARACTERS] or "The assertion does not hold."
    except OutOfTime:
        return "timeout", "The time limit was exceeded."
    except BaseException as error:
        return "error", describe(error)


def main() -> None:
    task = json.load(sys.stdin)
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    def out_of_time(*_: object) -> None:
        raise OutOfTime

    def report(kind: str, text: str) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        channel.write(json.dumps({"kind": kind, "text": text}) + "\n")

    def start_clock() -> None:
        signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3))

    for name, value in task["limits"].items():
        limit = getattr(resource, name)
        ceiling = resource.getrlimit(limit)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGALRM, out_of_time)
    refuse_accidents(os.getcwd())
    deadline = time.monotonic() + task["timeout_s"]
    namespace: dict = {"__name__": "solution"}
    start_clock()
    try:
        exec(compile(task["code"], "<solution>", "exec"), namespace)
        failed = None
    except SyntaxError as error:
        failed = ("format", f"The code is not valid Python: {error.msg} (line {error.lineno}).")
    except OutOfTime:
        failed = ("load", "The time limit was exceeded before any test.")
    except BaseException as error:
        failed = ("load", describe(error))
    for test in task["tests"]:
        if failed is None:
            start_clock()
        kind, text = failed or run(test, namespace)
        report(kind, text)
    # Ends at once, whatever threads or exit handlers the code under test has left.
    channel.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
