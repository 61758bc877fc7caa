"""What of `eval=lm_eval` can be told without lm-eval; what it measures is in tests/lm_eval."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
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


class Group:
    """What is read of a group of lm-eval's."""

    def __init__(self, name: str, tasks: list[str], groups: Sequence["Group"] = ()) -> None:
        self.name, self.tasks, self.groups = name, tasks, groups

    def get_all_tasks(self) -> list[SimpleNamespace]:
        own = [SimpleNamespace(task_name=name) for name in self.tasks]
        return [*own, *(task for group in self.groups for task in group.get_all_tasks())]

    def get_all_groups(self) -> list["Group"]:
        return [*self.groups, *(inner for group in self.groups for inner in group.get_all_groups())]


@pytest.mark.usefixtures("installed")
def test_a_group_counts_once_and_one_without_a_mean_by_its_tasks() -> None:
    inner = Group("stem", ["physics", "maths"])
    groups = {"mmlu": Group("mmlu", ["law"], [inner]), "stem": inner, "loose": Group("loose", ["a", "b"])}
    tasks = dict.fromkeys(["law", "physics", "maths", "a", "b", "alone"])
    read = settings("mmlu", "loose", "alone")
    read.__dict__["_loaded"] = {"groups": groups, "tasks": tasks}
    scores = {"mmlu": 0.5, "law": 0.1, "physics": 0.6, "maths": 0.8, "a": 0.2, "b": 0.4, "alone": 0.3}
    results = {name: {"alias": name, "acc,none": score, "acc_stderr,none": 0.1} for name, score in scores.items()}
    results["loose"] = {"alias": "loose"}
    found = read._read({"results": results, "higher_is_better": {}, "samples": {}})
    assert found.metrics == {f"eval/retention/{name}": scores[name] for name in ("alone", "mmlu", "a", "b")}


@pytest.mark.parametrize("experiment", ["sft", "sdpo_feedback", "continual"])
def test_composes_with_every_experiment(experiment: str) -> None:
    overrides = [f"experiment={experiment}", "eval=lm_eval", "eval.tasks=[hellaswag,mine.yaml]"]
    run = config.check(composed(overrides), overrides)
    assert run.eval is not None
    assert run.eval["tasks"] == ["hellaswag", "mine.yaml"]
    assert run.eval["retention_path"] == "embedded:retention", "our own suites stay"
