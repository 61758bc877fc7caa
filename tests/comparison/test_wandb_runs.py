"""Runs read from W&B say what their folders say."""

from pathlib import Path

import pandas as pd
import pytest
import wandb

from selfdistill.comparison import compare, load_runs, load_wandb
from selfdistill.comparison.wording import all_text
from selfdistill.errors import UserError
from tests.comparison.synthetic import write_run, write_sweep
from tests.comparison.wandb_stub import Api


def test_the_comparison_is_that_of_the_folders(tmp_path: Path) -> None:
    write_sweep(
        tmp_path / "sweep", [{"alpha": 0, "beta": 0}, {"alpha": 1, "beta": 0}, {"alpha": 1, "beta": 0.04}], (1, 2, 3)
    )
    write_run(tmp_path / "sweep" / "lost", {"experiment": "sdpo", "alpha": 0, "seed": 4}, status="failed", minute=9)
    api = Api(tmp_path / "sweep")
    here, there = load_runs(tmp_path / "sweep"), load_wandb("me/selfdistill", group="sweep", api=api)
    assert api.asked == [("me/selfdistill", {"group": "sweep"})]
    assert list(there.runs.index) == [f"me/selfdistill/{Path(run).name}" for run in here.runs.index]
    metrics = [name for name in here.runs if "eval/" in name]
    assert metrics
    pd.testing.assert_frame_equal(
        here.runs[metrics].reset_index(drop=True), there.runs[metrics].reset_index(drop=True), check_like=True
    )
    shared = ["step", "reward", "time/total_s", "tokens/generated"]
    pd.testing.assert_frame_equal(here.curves[shared], there.curves[shared])
    assert not [name for name in there.curves if name.startswith("_") or name == "completions"]
    ours, theirs = compare(here), compare(there)
    assert theirs.fields[0].field.knobs == ours.fields[0].field.knobs == ["alpha", "beta"]
    said = [line for line in all_text(ours) if "lost" not in line]
    assert said and [line for line in all_text(theirs) if "lost" not in line] == said
    assert there.runs.loc["me/selfdistill/lost", "status"] == "failed"


def test_what_cannot_be_read_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="W&B has no runs of me/nothing in the group sweep"):
        load_wandb("me/nothing", group="sweep", api=Api(tmp_path))

    def no_account() -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "Api", no_account)
    with pytest.raises(UserError, match="cannot be read from W&B: api_key not configured"):
        load_wandb("me/selfdistill")
