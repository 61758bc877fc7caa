"""What can be said of a reward of one's own before anything loads."""

from pathlib import Path

import pytest

from selfdistill import UserError, config
from selfdistill.config.targets import check_targets
from tests.command import composed

REWARDS = """
def good(prompts, completions, **columns): ...
def good_too(completions, **_): ...
def without_columns(prompts, completions): ...
def without_prompts(answer): ...
def made(most=3):
    return good
class Good:
    def __init__(self, most=3): ...
    def __call__(self, prompts, completions, **columns): ...
class Bad:
    def __call__(self, prompts, completions, completion_ids): ...
"""


@pytest.fixture(autouse=True)
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "called_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)


def checked(name: str, *more: str) -> None:
    line = ["reward=function", f"reward._target_=called_rewards.{name}", "trusted_prefixes=[called_rewards]", *more]
    check_targets(config.check(composed(line), line), ())


@pytest.mark.parametrize(
    ("name", "more"),
    [("good", []), ("good_too", []), ("made", ["reward._partial_=false"]), ("Good", ["reward._partial_=false"])],
)
def test_what_can_be_called_passes(name: str, more: list[str]) -> None:
    checked(name, *more)


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("without_columns", [], r"does not take completion_ids: add \*\*columns"),
        ("without_prompts", [], r"does not take prompts, completions, completion_ids"),
        ("Good", [], r"is a class, which is built once: write reward\._partial_=false"),
        ("Bad", ["reward._partial_=false"], r"does not take the data's columns"),
        ("good", ["reward._partial_=false"], r"is a function, which each batch calls: write reward\._partial_=true"),
    ],
)
def test_what_cannot_be_called_is_told(name: str, more: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        checked(name, *more)


def test_a_judge_of_the_evaluation_too() -> None:
    line = ["eval.scorer={_target_: called_rewards.without_columns, _partial_: true}"]
    with pytest.raises(UserError, match=r"^eval\.scorer\._target_=called_rewards\.without_columns is called as"):
        run = config.check(composed([*line, "trusted_prefixes=[called_rewards]"]))
        check_targets(run, ())
