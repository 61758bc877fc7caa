"""What a `_target_` names is found, its arguments are bound, and it is what gets built."""

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from selfdistill import config
from selfdistill.config.targets import bind, check_targets, make
from selfdistill.errors import UserError
from selfdistill.machine.memory_estimate import estimate
from tests.command import command, composed

MINE = "trusted_prefixes=[mine_for_tests]"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own module, with annotations that only a type checker can read."""
    text = """
        from typing import TYPE_CHECKING

        from selfdistill.data import DataSplits, load_data
        from selfdistill.models.export.lora import Lora
        from selfdistill.teachers.context import Feedback
        from selfdistill.teachers.server import ServerTeacher
        from selfdistill.teachers.weights import Ema, Weights

        if TYPE_CHECKING:
            from nowhere import Thing


        class Judge:
            def __init__(self, path: str, thing: "Thing | None" = None, count: "int" = 1) -> None:
                self.path, self.thing, self.count = path, thing, count


        def load(tokenizer, limit=6, **keys):
            assert tokenizer.chat_template is not None
            splits = load_data(tokenizer=tokenizer, **keys)
            return DataSplits(splits.train.select(range(limit)), splits.eval)


        def load_nothing(**keys):
            return []


        class Told(Feedback):
            pass


        class Adapter(Lora):
            pass


        class Live(Ema):
            pass


        class Ema(Weights):
            pass


        class Remote(ServerTeacher):
            pass
    """
    (tmp_path / "mine_for_tests.py").write_text(dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.delitem(__import__("sys").modules, "mine_for_tests", raising=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "p", "nonsense": 3}, r"reward\.nonsense: mine_for_tests\.Judge takes no such argument"),
        ({}, r"reward\.path is missing"),
        ({"path": 3}, r"reward\.path=3: write text"),
        ({"path": "p", "count": "many"}, r"reward\.count='many': write a whole number"),
    ],
)
def test_arguments_are_bound_where_an_annotation_does_not_resolve(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bind("reward", {"_target_": "mine_for_tests.Judge", **arguments})


def test_only_the_type_that_does_not_resolve_is_not_judged() -> None:
    bind("reward", {"_target_": "mine_for_tests.Judge", "path": "p", "thing": "anything", "count": 2})


def test_resolved_text_is_not_resolved_again() -> None:
    built = make({"_target_": "mine_for_tests.Judge", "path": "${seed}", "thing": [{"a": "\\${b}"}]}, "reward")
    assert (built.path, built.thing) == ("${seed}", [{"a": "\\${b}"}])


def test_later_arguments_go_where_they_are_named() -> None:
    node = {"_target_": "mine_for_tests.Judge", "path": "p"}
    something = object()
    assert make(node, "reward", thing=something, tokenizer=None).thing is something
    assert make(node, "reward", tokenizer=None).thing is None
    assert make(None, "reward") is None


@pytest.mark.long
def test_a_loader_of_ones_own_gives_the_data(tmp_path: Path) -> None:
    line = f"{MINE} data._target_=mine_for_tests.load completions_per_step=4 num_generations=2 eval=none debug=fast"
    outcome = command([*line.split(), "hardware=cpu", "+data.limit=5"], tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert "5 rows to train on" in outcome.out


def test_what_a_loader_gives_is_checked(tmp_path: Path) -> None:
    outcome = command([MINE, "data._target_=mine_for_tests.load_nothing", "eval=none", "logger=none"], tmp_path)
    assert outcome.code == 2
    assert "data._target_=mine_for_tests.load_nothing gives list" in outcome.err


def test_arguments_of_the_data_are_bound() -> None:
    run = config.check(composed([MINE, "data._target_=mine_for_tests.Judge"]))
    with pytest.raises(UserError, match=r"data\.\w+: mine_for_tests\.Judge takes no such argument"):
        check_targets(run, ())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("reward=none teacher=feedback teacher.context._target_=mine_for_tests.Told", "Told shows successes"),
        ("export=lora export.formats.lora._target_=mine_for_tests.Adapter", "has no adapter to export"),
        ("experiment=sdft_server teacher._target_=mine_for_tests.Remote rollout.temperature=0.9", "a served teacher"),
    ],
)
def test_a_class_of_ones_own_inherits_what_it_needs(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.check(composed([MINE, *line.split()]))


@pytest.mark.parametrize(("weights", "copied"), [("Live", True), ("Ema", False)])
def test_a_copy_is_counted_by_what_the_weights_are_and_not_by_their_name(weights: str, copied: bool) -> None:
    line = f"{MINE} reward=none teacher=demonstration teacher.weights._target_=mine_for_tests.{weights}"
    assert ("teacher's copy" in estimate(config.check(composed(line.split())))) == copied


@pytest.mark.parametrize(
    ("option", "copied"), [("base", True), ("ema", True), ("copy", True), ("trust_region", True), ("live", False)]
)
def test_which_weights_keep_a_copy(option: str, copied: bool) -> None:
    overrides = ["reward=none", "teacher=demonstration", f"teacher/weights={option}"]
    assert ("teacher's copy" in estimate(config.check(composed(overrides)))) == copied
