"""Runs what docs/ROBUSTNESS.md reports, and writes its tables.

    python -m tests.torture              everything, two processes at a time, and the page
    python -m tests.torture kills disk   some of it, printed

A torture is a module with a function `rows`, which returns what was tried, how often, and what happened.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.forks import Row, prepare, table
from tests.torture import faults
from tests.torture.trials import RUNS

PAGE = Path(__file__).parents[2] / "docs" / "ROBUSTNESS.md"
# Title and module, in the order of the page.
TORTURES = {
    "kills": ("Kills", "tests.torture.kills"),
    "signals": ("Signals", "tests.torture.signals"),
    "damage": ("Damaged checkpoints", "tests.torture.damage"),
    "disk": ("Disk", "tests.torture.disk"),
    "command_line": ("Command lines", "tests.fuzz.command_line"),
    "data_files": ("Data files", "tests.fuzz.data_files"),
    "attacks": ("Attacks on the code reward", "tests.torture.attacks"),
    "architectures": ("Architectures", "tests.torture.architectures"),
}
# Two of these run at a time, each in a process of its own; the longest come first.
JOBS = [*(f"kills:{number}" for number in range(len(RUNS))), *(name for name in TORTURES if name != "kills")]
RESULT = "TORTURE_RESULT"


def main(names: Sequence[str]) -> int:
    if faults.compiler() is None:
        print("There is no C compiler (cc), which the faults need.")
        return 2
    if not names:
        return _all()
    if not faults.is_preloaded():
        return faults.start_again("tests.torture", list(names))
    prepare()
    found: dict[str, list[Row]] = {}
    for name in names:
        torture, _, part = name.partition(":")
        title, module = TORTURES[torture]
        started = time.monotonic()
        rows = importlib.import_module(module).rows
        found[torture] = found.get(torture, []) + (rows(only=int(part)) if part else rows())
        took = f"{(time.monotonic() - started) / 60:.1f} minutes"
        print(f"## {title}, {took}\n\n{table(found[torture])}\n", flush=True)
    if RESULT in os.environ:
        lines = {name: [asdict(row) for row in rows] for name, rows in found.items()}
        Path(os.environ[RESULT]).write_text(json.dumps(lines))
    return int(any(row.faults for rows in found.values() for row in rows))


def _all() -> int:
    """Everything, in two processes; the tables go into the page."""
    started, folder = time.monotonic(), Path(PAGE.parents[1], "outputs", "torture")
    folder.mkdir(parents=True, exist_ok=True)
    results = [folder / f"{number}.json" for number in range(len(JOBS))]

    def tried(job: str, result: Path) -> int:
        result.unlink(missing_ok=True)
        return subprocess.call([sys.executable, "-m", "tests.torture", job], env={**os.environ, RESULT: str(result)})

    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(tried, JOBS, results))
    found: dict[str, list[Row]] = {}
    for result in results:
        for name, rows in _read(result).items():
            found.setdefault(name, []).extend(map(_row, rows))
    write_page(found, (time.monotonic() - started) / 60)
    return max(codes)


def _row(row: dict) -> Row:
    return Row(row["what"], row["times"], row["outcomes"], tuple(row["faults"]))


def _read(result: Path) -> dict[str, list[dict]]:
    return json.loads(result.read_text()) if result.exists() else {}


def write_page(found: dict[str, list[Row]], minutes: float) -> None:
    """Puts each table between its markers."""
    page = PAGE.read_text(encoding="utf-8")
    for name, rows in found.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table(rows).rstrip()}\n\n{end}{rest.partition(end)[2]}" if rest else page
    total = sum(row.times for rows in found.values() for row in rows)
    said = f"{total:,} trials, {sum(len(row.faults) for rows in found.values() for row in rows)} of them faults, "
    begin, end = "<!-- total -->", "<!-- /total -->"
    before, _, rest = page.partition(begin)
    page = f"{before}{begin}{said}{minutes:.0f} minutes{end}{rest.partition(end)[2]}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
