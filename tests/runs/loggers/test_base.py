import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from selfdistill.runs.console import flat
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.loggers.base import columns_of, finite


def test_flat():
    assert flat({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None, "g": {}}) == {
        "a.b.c": 1,
        "a.d": [1, {"e": 2}],
        "f": None,
    }


def test_finite():
    values = {"a": 1, "b": float("nan"), "c": None, "d": "x", "e": np.float32(0.5), "f": float("-inf"), "g": [1.0]}
    assert finite(values) == {"a": 1, "e": 0.5}


def test_columns():
    columns, data = columns_of([{"a": 1, "b": {"x": 2}}, {"c": float("nan"), "a": 3}])
    assert columns == ["a", "b.x", "c"]
    assert data == [[1, 2, None], [3, None, None]]


def test_trackio(tmp_path):
    pytest.importorskip("trackio", reason="NO TRACKIO HERE: `make trackio` makes an environment with it.")
    program = """
import sys
from pathlib import Path
from omegaconf import OmegaConf
from selfdistill.runs.loggers import TrackioLogger
from selfdistill.runs.console import flat
from selfdistill.runs.folder import RunFolder
config = OmegaConf.create({"seed": 3, "teacher": {"api_key": "sk-something-secret"}})
run = RunFolder.create(Path(sys.argv[1]), "r", config)
for steps in ([1, 2], [2, 3]):
    logger = TrackioLogger(project="test", group="g")
    logger.start(run, config)
    for step in steps:
        logger.log(step, {"reward": step / 10, "kl": float("nan")})
    logger.table("completions", step, [{"prompt": "p", "completion": "c"}])
    logger.files("report", [run.path / "config.yaml"])
    logger.summary({"after": {"accuracy": 0.75}})
    logger.finish(failed=True)
print("location", logger.location)
from trackio.sqlite_storage import SQLiteStorage
print("names", [record["name"] for record in SQLiteStorage.get_run_records("test")] == [run.run_id])
record = SQLiteStorage.get_run_records("test")[0]
rows = SQLiteStorage.get_logs("test", record["name"])
print("rewards", {row["step"]: row["reward"] for row in rows if "reward" in row})
print("once", len([row for row in rows if "reward" in row]))
print("summary", [row["summary/after/accuracy"] for row in rows if "summary/after/accuracy" in row])
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "outputs")], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(root), "TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if not line.startswith("*"))
    assert lines["names"] == "True"
    assert lines["rewards"] == "{1: 0.1, 2: 0.2, 3: 0.3}"
    assert lines["once"] == "3"
    assert lines["summary"] == "[0.75, 0.75]"
    assert lines["location"] == "trackio show --project test"
    assert all(b"sk-something-secret" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_trackio_that_is_not_installed(tmp_path, monkeypatch):
    from selfdistill.errors import UserError
    from selfdistill.runs.loggers import TrackioLogger

    monkeypatch.setitem(sys.modules, "trackio", None)
    config = OmegaConf.create({})
    run = RunFolder.create(tmp_path, "r", config)
    with pytest.raises(UserError, match="pip install trackio"):
        TrackioLogger().start(run, config)
    run.finish("finished")
