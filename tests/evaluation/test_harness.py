"""What of `eval=lm_eval` can be told without lm-eval; what it measures is in tests/lm_eval."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from selfdistill import config
from selfdistill.errors import UserError
from selfdistill.evaluation import harness
from selfdistill.evaluation.harness import HarnessSettings
from selfdistill.rewards import ExactMatch
from tests.command import composed


def settings(*tasks: str, **more: Any) -> HarnessSettings:
    return HarnessSettings(None, ExactMatch(), tasks=tasks, **more)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: object() if name == "lm_eval" else find_spec(name))


def test_without_lm_eval_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed\. pip install 'selfdistill\[lm_eval\]' brings it"):
        settings("hellaswag")


@pytest.mark.usefixtures("installed")
def test_no_task_is_refused() -> None:
    for tasks in ((), "hellaswag"):
        with pytest.raises(UserError, match="write a list"):
            HarnessSettings(None, ExactMatch(), tasks=tasks)


@pytest.mark.usefixtures("installed")
def test_a_file_that_runs_code_is_refused_unless_it_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "base.yml").write_text("process_docs: !function mine.clean\n")
    (tmp_path / "task.yaml").write_text("include: base.yml\ntask: mine\n")
    with pytest.raises(UserError, match=r"base\.yml calls Python functions .* trusted_prefixes=\[lm_eval\]"):
        settings(str(tmp_path / "task.yaml"))
    assert settings(str(tmp_path / "task.yaml"), trusted_prefixes=["lm_eval"]).tasks
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read: No such file"):
        settings(str(tmp_path / "gone.yaml"))


@pytest.mark.parametrize("experiment", ["sft", "sdpo_feedback", "continual"])
def test_composes_with_every_experiment(experiment: str) -> None:
    overrides = [f"experiment={experiment}", "eval=lm_eval", "eval.tasks=[hellaswag,mine.yaml]"]
    run = config.check(composed(overrides), overrides)
    assert run.eval is not None
    assert run.eval["tasks"] == ["hellaswag", "mine.yaml"]
    assert run.eval["retention_path"] == "embedded:retention", "our own suites stay"
