"""How long the comparison of many runs takes, and how large its page is.

    python experiments/benchmarks/compare_speed.py [--runs 1000] [--steps 100]

Makes that many runs' folders up, with 36 metrics a step, and compares them in a process of its own; exits with 1 where
that takes more than 20 s of CPU or the page more than 500 kB. On a machine that does other work as well the wall time
means little.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.comparison.synthetic import FULL, write_sweep  # noqa: E402

LIMIT_S, LIMIT_BYTES = 20.0, 500_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    seeds = range(1, 11)
    grid = product((0.0, 0.02, 0.04, 0.08, 0.16), (0.0, 0.25, 0.5, 0.75, 1.0), (2, 4, 8, 16))
    settings = [dict(zip(("beta", "alpha", "num_generations"), values)) for values in grid][: given.runs // len(seeds)]
    with tempfile.TemporaryDirectory() as folder:
        write_sweep(Path(folder) / "sweep", settings, seeds, steps=given.steps, base=FULL)
        start = time.perf_counter()
        command = [sys.executable, "-m", "selfdistill.compare", f"{folder}/sweep"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        wall_s = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = used.ru_utime + used.ru_stime
        size = (Path(folder) / "sweep" / "report" / "report.html").stat().st_size
    print(f"{len(settings) * len(seeds)} runs of {given.steps} steps: {wall_s:.1f} s, {cpu_s:.1f} s of CPU")
    print(f"report.html: {size / 1000:.0f} kB")
    return int(cpu_s > LIMIT_S or size > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
