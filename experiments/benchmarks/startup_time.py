"""How long the commands that only answer take, as a multiple of `python -c "import hydra"`.

    python experiments/benchmarks/startup_time.py [REPEATS]

Prints wall and CPU seconds (the least of all repeats, commands taken in turn) and their ratios; exits with 1 where a
CPU ratio is above 3. On a machine that does other work as well only the CPU ratio means something.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 3.0
ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, "-m", "selfdistill.train"]
COMMANDS = {
    "import hydra": [sys.executable, "-c", "import hydra"],
    "--help": [*TRAIN, "--help"],
    "--cfg job": [*TRAIN, "--cfg", "job"],
    "refused key": [*TRAIN, "betta=0"],
    "refused range": [*TRAIN, "beta=-1"],
    "refused combination": [*TRAIN, "reward=none"],
}


def measure(command: list[str], folder: str) -> tuple[float, float]:
    """Wall and CPU seconds of one process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    start = time.perf_counter()
    _, _, usage = os.wait4(process.pid, 0)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def main() -> int:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    least: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for name, command in COMMANDS.items():
                wall_s, cpu_s = measure(command, folder)
                old = least.get(name, (wall_s, cpu_s))
                least[name] = (min(old[0], wall_s), min(old[1], cpu_s))
    base_wall_s, base_cpu_s = least["import hydra"]
    print(f"{'command':<20} {'wall s':>7} {'ratio':>6} {'CPU s':>7} {'ratio':>6}")
    for name, (wall_s, cpu_s) in least.items():
        print(f"{name:<20} {wall_s:7.3f} {wall_s / base_wall_s:6.2f} {cpu_s:7.3f} {cpu_s / base_cpu_s:6.2f}")
    return int(any(cpu_s > LIMIT * base_cpu_s for _, cpu_s in least.values()))


if __name__ == "__main__":
    sys.exit(main())
