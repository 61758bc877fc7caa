"""How long 64 solutions with 5 tests each take in the sandbox, and without one, against 64 starts of Python.

    python experiments/benchmarks/python_tests_speed.py

Takes the three in turn, five times, and prints the ratios of the medians.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from selfdistill.rewards import PythonTests

SOLUTIONS, WORKERS = 64, 2
CODE = "def f(items):\n    return sorted(set(items))[::-1]\n"
TESTS = [f"assert f([{n}, 1, {n}, 2]) == {sorted({n, 1, 2})[::-1]}" for n in range(3, 8)]


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def judged(allowed: bool | str) -> Callable[[], object]:
    reward = PythonTests(allow_code_execution=allowed, workers=WORKERS, feedback="none")

    def judge() -> None:
        scores = reward(prompts=["q"] * SOLUTIONS, completions=[CODE] * SOLUTIONS, tests=[TESTS] * SOLUTIONS)
        assert scores == [1.0] * SOLUTIONS

    return judge


def starts() -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda _: subprocess.run([sys.executable, "-I", "-c", "pass"], check=True), range(SOLUTIONS)))


def main() -> None:
    work = {"start of Python": starts, "sandbox": judged(True), "unsandboxed": judged("unsandboxed")}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(5):
        for name, function in work.items():
            seconds[name].append(timed(function))
    least = statistics.median(seconds["start of Python"])
    for name, values in seconds.items():
        print(f"{name:>16}  {statistics.median(values):6.2f} s  {statistics.median(values) / least:5.2f}")


if __name__ == "__main__":
    main()
