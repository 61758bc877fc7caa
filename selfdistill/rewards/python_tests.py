"""Code completions, judged by unit tests that run in a child process."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from selfdistill.errors import UserError
from selfdistill.rewards.base import Result, Reward, check_choice, shorten
from selfdistill.rollout import text_of

CHILD = Path(__file__).with_name("python_tests_child.py")
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|$)", re.DOTALL)
FEEDBACK_CHARACTERS = 2000
SHOWN_TESTS = 2
# `load`: the code itself did not run to its end, so that no test could start.
ORDER = ("load", "error", "timeout", "format", "wrong")
START_GRACE_S = 10.0


@cache
def _without_network() -> tuple[str, ...]:
    """The command that starts a process without network, in a process namespace of its own; empty where forbidden."""
    command = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    try:
        tried = subprocess.run([*command, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if tried.returncode == 0 else ()


def extract_code(text: str) -> str:
    """The last fenced block of a completion, or the whole of it."""
    blocks = FENCE.findall(text)
    return (blocks[-1] if blocks else text).strip("\n")


@dataclass(eq=False)
class PythonTests(Reward):
    """Runs a completion's code against the row's tests, each a piece of Python that raises when it fails.

    The child process has limits on wall time, CPU time, memory, file size and open files, an empty environment,
    Python's isolated mode and a temporary working folder. Sockets, processes, signals and changes of files outside that
    folder are refused inside the interpreter, and where the system offers unprivileged namespaces there is no network.

    This contains accidents: endless loops, memory, stray files, a forgotten download. It is NOT a sandbox against an
    attacker. The code can read the files that the user can read, and native code can circumvent what the interpreter
    refuses. Nor does it prevent reward hacking: tests and code share one process. For code that may do harm on purpose,
    use a container or a virtual machine.

    Args:
        allow_code_execution: must be true, or the reward is not built.
        tests_field: the column with the tests: a list of pieces of code, or one. None or no test: not scorable (None).
        partial: score = share of the tests passed, instead of 1 where all pass and 0 otherwise.
        feedback: `tests` shows at most two failing tests (errors first, then timeouts, form, wrong results; shorter
            ones first) in at most 2000 characters; with `none` plain floats come back.
        timeout_s: wall and CPU time of one completion's tests together, in seconds.
        memory_mib: address space of the process.
        file_mib: largest file it may write.
        workers: processes at a time; None = number of cores.
    """

    verifiable: ClassVar[bool] = True

    allow_code_execution: bool = False
    tests_field: str = "tests"
    partial: bool = False
    feedback: str = "tests"
    timeout_s: float = 5.0
    memory_mib: int = 512
    file_mib: int = 1
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.allow_code_execution is not True:
            raise UserError(
                "reward python_tests runs code that the model wrote, on this machine, contained but not sandboxed. "
                "Write allow_code_execution=true if that is what you want."
            )
        check_choice("feedback", self.feedback, ("none", "tests"))
        for key in ("timeout_s", "memory_mib", "file_mib"):
            if getattr(self, key) <= 0:
                raise UserError(f"reward.{key} is {getattr(self, key)}; write a number above 0")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Result]:
        if self.tests_field not in columns:
            raise UserError(
                f"reward {self.__name__} needs the column {self.tests_field!r} with the tests of each row, and the "
                f"dataset does not have it. Name the right column with reward.tests_field=NAME."
            )
        tests = [self._tests(value, row) for row, value in enumerate(columns[self.tests_field])]
        codes = [extract_code(text_of(completion)) for completion in completions]
        with ThreadPoolExecutor(self.workers or os.cpu_count()) as pool:
            return list(pool.map(self._judge, codes, tests))

    def _tests(self, value: Any, row: int) -> list[str]:
        tests = [value] if isinstance(value, str) else list(value or [])
        if not all(isinstance(test, str) for test in tests):
            raise UserError(
                f"reward {self.__name__}, row {row} of the batch: the column {self.tests_field!r} holds {value!r}; "
                f'write a list of pieces of Python code, such as ["assert f(2) == 4"]'
            )
        return tests

    def _judge(self, code: str, tests: list[str]) -> Result:
        if not tests:
            return None
        outcomes = self._run(code, tests) if code.strip() else [("format", "The response holds no code.")] * len(tests)
        passed = sum(kind == "ok" for kind, _ in outcomes)
        score = passed / len(tests) if self.partial else float(passed == len(tests))
        if self.feedback == "none":
            return score
        return {"score": score, "feedback": None if passed == len(tests) else _feedback(tests, outcomes)}

    def _run(self, code: str, tests: list[str]) -> list[tuple[str, str]]:
        """Kind (ok, or one of ORDER) and message of every test."""
        seconds = math.ceil(self.timeout_s) + 1
        limits = {
            "RLIMIT_CPU": seconds,
            "RLIMIT_AS": self.memory_mib * 2**20,
            "RLIMIT_FSIZE": self.file_mib * 2**20,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }
        task = json.dumps({"code": code, "tests": tests, "limits": limits, "timeout_s": self.timeout_s})
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            process = subprocess.Popen(
                [*_without_network(), sys.executable, "-I", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                # Numerical libraries start a thread a core, whose stacks alone can exceed the memory limit.
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
                text=True,
            )
            timed_out = False
            try:
                output, _ = process.communicate(task, timeout=self.timeout_s + START_GRACE_S)
            except subprocess.TimeoutExpired:
                timed_out = True
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
        found = [(result["kind"], result["text"]) for result in map(json.loads, output.splitlines())][: len(tests)]
        timed_out = timed_out or process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU)
        died = ("error", "The process ended before the test did.")
        if timed_out:
            died = ("timeout", "The time limit was exceeded.")
        return [*found, *[died] * (len(tests) - len(found))]


def _feedback(tests: list[str], outcomes: list[tuple[str, str]]) -> str:
    """How many tests fail, and what happened in the first of them by kind and length."""
    failing = [
        (ORDER.index(kind), len(text), test, text)
        for test, (kind, text) in zip(tests, outcomes, strict=True)
        if kind != "ok"
    ]
    head = f"{len(failing)} of {len(tests)} tests fail."
    # What is wrong with the code itself is the same for every test: it is said once.
    same_for_all = outcomes[0][0] in ("load", "format")
    blocks = [outcomes[0][1]] if same_for_all else [f"{test.strip()}\n{text}" for _, _, test, text in sorted(failing)]
    budget = (FEEDBACK_CHARACTERS - len(head)) // SHOWN_TESTS - 2
    return "\n\n".join([head, *(shorten(block, budget) for block in blocks[:SHOWN_TESTS])])
