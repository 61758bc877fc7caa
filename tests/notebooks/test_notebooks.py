"""The notebooks, executed from the first cell to the last; and what is committed of their outputs."""

import sys
import warnings
from pathlib import Path

import pytest

from tests.comparison.synthetic import write_sweep
from tests.reference import ROOT

nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 600_000


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, first: str = "") -> str:
    """Runs a notebook in a folder, after a cell of the test's own; returns all that it printed."""
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    if first:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Jupyter's own
        NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text", "") for output in outputs if output.output_type == "stream")


@pytest.mark.long
def test_sdpo_by_hand_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asserts by itself that loss and gradient are those of the trainer."""
    said = execute("sdpo_by_hand.ipynb", tmp_path, monkeypatch)
    assert "nine divergences, equal" in said
    assert "by hand: loss" in said and "ours:    loss" in said


@pytest.mark.long
def test_compare_runs_from_folders_and_from_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tmp_path / "outputs" / "multirun" / "compare_runs"
    write_sweep(sweep, [{"alpha": 0}, {"alpha": 1}], (1, 2, 3))
    for run in sweep.iterdir():
        rows = [
            f'{{"step": {step}, "suite": null, "row": "{row}", "prompt": "p", "answer": "a", "verdict": {step > row}}}'
            for step in (0, 12) for row in range(4)
        ]  # fmt: skip
        (run / "evaluation.jsonl").write_text("\n".join(rows).replace("True", "1.0").replace("False", "0.0") + "\n")
    monkeypatch.setenv("WANDB_RUNS", "me/selfdistill")
    stub = "import wandb\nfrom pathlib import Path\nfrom tests.comparison.wandb_stub import Api\n"
    stub += f"wandb.Api = lambda: Api(Path({str(sweep)!r}))"
    said = execute("compare_runs.ipynb", tmp_path, monkeypatch, stub)
    # W&B has no answers to single items, and so no McNemar test.
    claims = [claim.split("; on the same 4 items")[0].strip().rstrip(".") for claim in said.split("•")[1:5]]
    assert len(claims) == 4 and claims[:2] == claims[2:]
    monkeypatch.delenv("WANDB_RUNS")
    assert "skipped: WANDB_RUNS names no project" in execute("compare_runs.ipynb", tmp_path, monkeypatch)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_pictures_are_committed_and_small(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert file.stat().st_size < MOST_BYTES
    assert str(ROOT) not in file.read_text(), "a path of this machine"
    assert sys.prefix not in file.read_text()
