"""What Hydra itself would build or call is checked before it does."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from selfdistill.config.hydra_keys import check_composed
from selfdistill.errors import UserError

HYDRA: dict[str, Any] = {
    "overrides": {"hydra": [], "task": []}, "output_subdir": None, "searchpath": [], "callbacks": {},
    "job_logging": {"root": None, "version": 1}, "hydra_logging": {"root": None, "version": 1},
    "launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"},
    "sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": None},
}  # fmt: skip


def checked(**changes: Any) -> None:
    check_composed(OmegaConf.create({"hydra": {**HYDRA, **changes}, "trusted_prefixes": []}))


def test_what_comes_with_hydra_and_with_us_passes() -> None:
    checked()
    checked(callbacks={"check_sweep": {"_target_": "selfdistill.runs.sweep.CheckSweep"}})
    checked(job_logging={"handlers": {"console": {"class": "logging.StreamHandler"}}})


@pytest.mark.parametrize(
    "changes",
    [
        {"callbacks": {"x": {"_target_": "os.getpid"}}},
        {"callbacks": {"x": {"_target_": "hydra.experimental.callbacks.LogJobReturnCallback"}}},
        {"callbacks": {"x": {"_target_": "selfdistill.files.write_atomically", "path": "x"}}},
        {"callbacks": {"x": {"_target_": "${oc.env:HOME}"}}},
        {"launcher": {"_target_": "os.getpid"}},
        {"launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.os.system"}},
        {"sweeper": {**HYDRA["sweeper"], "sampler": {"_target_": "torch.load", "f": "x"}}},
        {"sweeper": {**HYDRA["sweeper"], "custom_search_space": "os.getpid"}},
        {"job_logging": {"formatters": {"x": {"()": "os.getpid"}}}},
        {"hydra_logging": {"handlers": {"x": {"class": "os.getpid"}}}},
    ],
)
def test_nothing_else_is_built(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"hydra\."):
        checked(**changes)
