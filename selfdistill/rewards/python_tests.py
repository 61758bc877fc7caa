"""Code completions, judged by unit tests that run in a sandbox."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from selfdistill.errors import UserError
from selfdistill.rewards.base import Result, Reward, check_choice, shorten
from selfdistill.rewards.sandbox import Outcome, Task, choose
from selfdistill.rollout import text_of

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|$)", re.DOTALL)
FEEDBACK_CHARACTERS = 2000
SHOWN_TESTS = 2
# `load`: the code itself did not run to its end, so that no test could start.
ORDER = ("load", "error", "timeout", "format", "wrong")


def extract_code(text: str) -> str:
    """The last fenced block of a completion, or the whole of it."""
    blocks = FENCE.findall(text)
    return (blocks[-1] if blocks else text).strip("\n")


@dataclass(eq=False)
class PythonTests(Reward):
    """Runs a completion's code against the row's tests, each a piece of Python that raises when it fails.

    The code runs in a sandbox: bubblewrap where it is installed (no network, an empty home, a read-only system, no
    environment, limits on processes, memory, files and disk), or a server that speaks SandboxFusion's API. Only
    `allow_code_execution="unsandboxed"` runs it in a bare child process, which contains accidents and nothing else.

    Tests and code never share a process: a test calls the code from outside, and compares plain data by itself. So an
    object that claims to equal everything equals nothing, and no expected value can be read. What a test measures with
    (`abs`, `math.isclose`) keeps its meaning, whatever the code calls by these names. Each test sees the code as it was
    after loading. A test cannot derive a class from one of the solution's, or compare its objects with plain data.

    Args:
        allow_code_execution: `True`, or "unsandboxed"; the reward is not built otherwise.
        tests_field: the column with the tests: a list of pieces of code, or one. None or no test: not scorable (None).
        partial: score = share of the tests passed, instead of 1 where all pass and 0 otherwise.
        feedback: `tests` shows at most two failing tests (errors first, then timeouts, form, wrong results; shorter
            ones first) in at most 2000 characters; with `none` plain floats come back.
        timeout_s: wall and processor time of one completion's tests together, in seconds.
        memory_mib: address space of one process; all together may hold twice as much in memory.
        file_mib: largest file it may write.
        disk_mib: all its files together.
        processes: how many processes and threads it may have at a time.
        workers: completions that are judged at a time; None = number of cores.
        sandbox_url: a server that speaks SandboxFusion's API, such as http://localhost:8080.

    Raises:
        UserError: code may not be run, or there is no sandbox for it.
    """

    verifiable: ClassVar[bool] = True

    allow_code_execution: bool | str = False
    tests_field: str = "tests"
    partial: bool = False
    feedback: str = "tests"
    timeout_s: float = 5.0
    memory_mib: int = 512
    file_mib: int = 1
    disk_mib: int = 16
    processes: int = 32
    workers: int | None = None
    sandbox_url: str | None = None

    def __post_init__(self) -> None:
        check_choice("feedback", self.feedback, ("none", "tests"))
        for key in ("timeout_s", "memory_mib", "file_mib", "disk_mib", "processes"):
            if getattr(self, key) <= 0:
                raise UserError(f"reward.{key} is {getattr(self, key)}; write a number above 0")
        self._sandbox = choose(self.allow_code_execution, self.sandbox_url, self.disk_mib)

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

    def _run(self, code: str, tests: list[str]) -> list[Outcome]:
        sizes = {key: getattr(self, key) for key in ("timeout_s", "memory_mib", "file_mib", "processes")}
        return self._sandbox.run(Task(code, tests, **sizes))


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
