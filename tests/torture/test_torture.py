"""A few of the faults of `make torture`, one of each kind: the rest of them is on docs/ROBUSTNESS.md."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.forks import Row
from tests.torture import __main__ as torture
from tests.torture import faults

ROOT = Path(__file__).parents[2]
SAMPLE = """
import sys
from tests.fuzz.forks import prepare
from tests.torture import damage, disk, kills, signals
prepare()
disk.POINTS, disk.FILES, disk.SIZES_KIB = 3, ("metrics.jsonl", "optimizer.pt"), (1024,)
signals.POINTS, signals.UNCAUGHT = 2, ()
damage.DAMAGES, damage.RUNS = {"noise": damage.DAMAGES["noise"]}, list(damage.RUNS)[:1]
faults = [fault for rows in (kills.rows(8, 4), disk.rows(), signals.rows(), damage.rows()) for row in rows
    for fault in row.faults]
print("\\n".join(faults))
sys.exit(len(faults) > 0)
"""


@pytest.mark.long
@pytest.mark.skipif(faults.compiler() is None, reason="there is no C compiler")
def test_a_sample_of_the_faults_ends_well(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text(SAMPLE)
    program = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
    program += "from tests.torture import faults; sys.exit(faults.start_again('sample', []))"
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tables_stand_between_their_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "ROBUSTNESS.md"
    page.write_text(torture.PAGE.read_text())
    monkeypatch.setattr(torture, "PAGE", page)
    row = Row("a kill", 3, {"the same": 2, "other numbers": 1}, ("killed at 5: metrics.jsonl differs",))
    for _ in range(2):
        torture.write_page({"kills": [row]}, 28.4)
    text = page.read_text()
    assert text.count("| a kill | 3 | 1 other numbers, 2 the same |") == 1
    assert text.count("- killed at 5: metrics.jsonl differs") == 1
    assert "3 trials, 1 of them faults, 28 minutes" in text
    for name in torture.TORTURES:
        assert f"<!-- {name} -->" in text and f"<!-- /{name} -->" in text


@pytest.mark.parametrize("name", torture.TORTURES)
def test_every_torture_has_its_function(name: str) -> None:
    inspect.signature(importlib.import_module(torture.TORTURES[name][1]).rows).bind()  # it is called without arguments


@pytest.mark.parametrize("name", torture.TORTURES)
def test_no_table_of_the_page_is_empty(name: str) -> None:
    between = torture.PAGE.read_text().partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    rows = [line for line in between.splitlines() if line.startswith("|")]
    assert len(rows) > len(["the names of the columns", "the line below them"])
