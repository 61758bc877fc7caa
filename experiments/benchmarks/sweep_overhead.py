"""What a job of a sweep costs beside its training, as a multiple of importing the libraries and loading the model.

    OMP_NUM_THREADS=1 python experiments/benchmarks/sweep_overhead.py [REPEATS]

The job (process, set-up, one step of eight short completions, close) is what a sweep of five jobs takes more than one
of a single job, by four; the libraries are `import torch, transformers, trl` in a process of its own. Prints CPU and
wall seconds, the least of all repeats, and exits with 1 where the CPU ratio is above 1.3. On a machine that does other
work as well only the CPU ratio means something.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1.3
JOBS = 5
ROOT = Path(__file__).parents[2]
SWEEP = [
    sys.executable, "-m", "selfdistill.train", "--multirun", "experiment=sdpo", "max_steps=1", "hardware=cpu",
    "completions_per_step=8", "rollout.max_completion_tokens=4", "training.checkpoint_every=0", "eval=none",
    "logger=none", "hydra.launcher.n_jobs=1",
]  # fmt: skip
LOADED = """
import torch, transformers, trl
from selfdistill.models.loading import resolve
transformers.AutoModelForCausalLM.from_pretrained(resolve("embedded"))
"""
COMMANDS = {
    "libraries": [sys.executable, "-c", "import torch, transformers, trl"],
    "libraries and model": [sys.executable, "-c", LOADED],
    "a sweep of 1": [*SWEEP, "seed=range(0,1)"],
    f"a sweep of {JOBS}": [*SWEEP, f"seed=range(0,{JOBS})"],
}


def measure(command: list[str], folder: str) -> tuple[float, float]:
    """CPU and wall seconds of a process and of those that it waited for."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"failed: {' '.join(command)}"
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start


def main() -> int:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    least: dict[str, tuple[float, float]] = {}
    for _ in range(repeats):
        for name, command in COMMANDS.items():
            with tempfile.TemporaryDirectory() as folder:
                cpu_s, wall_s = measure(command, folder)
            old = least.get(name, (cpu_s, wall_s))
            least[name] = (min(old[0], cpu_s), min(old[1], wall_s))
    one, many = least["a sweep of 1"], least[f"a sweep of {JOBS}"]
    least["one job more"] = ((many[0] - one[0]) / (JOBS - 1), (many[1] - one[1]) / (JOBS - 1))
    base = least["libraries and model"]
    print(f"{'':<22} {'CPU s':>7} {'ratio':>6} {'wall s':>7} {'ratio':>6}")
    for name, (cpu_s, wall_s) in least.items():
        print(f"{name:<22} {cpu_s:7.2f} {cpu_s / base[0]:6.2f} {wall_s:7.2f} {wall_s / base[1]:6.2f}")
    return int(least["one job more"][0] > LIMIT * base[0])


if __name__ == "__main__":
    sys.exit(main())
