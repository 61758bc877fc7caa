"""The command line in this process: what `python -m selfdistill.NAME …` prints, leaves behind and exits with."""

import contextlib
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import pytest
from omegaconf import DictConfig

from selfdistill import train
from selfdistill.config.conf import CONF


@dataclass
class Outcome:
    """`left` are the files and folders that were not there before, relative to the folder it ran in."""

    code: int
    out: str
    err: str
    left: set[str]


def command(arguments: Sequence[str], folder: Path, door: ModuleType = train) -> Outcome:
    """Runs an entrypoint in `folder`, as a process of its own would."""
    before = _listing(folder)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [door.__name__, *arguments])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                door.main()
            except SystemExit as end:
                code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue(), _listing(folder) - before)


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def composed(overrides: Sequence[str] = (), file: Path = CONF / "train.yaml") -> DictConfig:
    """The composed configuration, without running anything."""
    with hydra.initialize_config_dir(str(file.parent), version_base="1.3"):
        return hydra.compose(file.stem, list(overrides))


def options(group: str) -> list[str]:
    """The options of a group, e.g. of `teacher/weights`."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml") if not file.stem.startswith("_"))


def groups() -> list[str]:
    """Every group, nested ones with a slash."""
    found = {str(file.parent.relative_to(CONF)) for file in CONF.rglob("*.yaml")}
    return sorted(
        group for group in found if group not in (".", "_commands", "accelerate") and not group.startswith("hydra")
    )


def sampled(cases: Iterable[Any], every: int = 4) -> list[Any]:
    """All cases, of which `make test` takes one of every so many, and `make test-long` the others."""
    return [case if number % every == 0 else _long(case) for number, case in enumerate(cases)]


def _long(case: Any) -> Any:
    if isinstance(case, type(pytest.param())):
        return pytest.param(*case.values, marks=[*case.marks, pytest.mark.long], id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
