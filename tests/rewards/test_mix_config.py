"""Several rewards from the command line."""

import json
from pathlib import Path

import pytest

from selfdistill import UserError, config
from selfdistill.config.targets import make
from selfdistill.rewards import Form, Mix
from tests.command import command, composed


def mixed(*overrides: str) -> dict[str, tuple[str, float]]:
    line = ["reward=mix", *overrides]
    mix = make(config.check(composed(line), line).reward, "reward")
    assert isinstance(mix, Mix)
    return {name: (part.__name__, weight) for name, part, weight in mix.parts}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([], {"accuracy": ("exact_match", 1.0), "form": ("form", 0.2)}),
        (
            ["reward@reward.rewards.accuracy=multiple_choice", "reward.weights.form=0.5"],
            {"accuracy": ("multiple_choice", 1.0), "form": ("form", 0.5)},
        ),
        (
            ["+reward@reward.rewards.short=repetition_penalty", "+reward.weights.short=0.1"],
            {"accuracy": ("exact_match", 1.0), "form": ("form", 0.2), "short": ("repetition_penalty", 0.1)},
        ),
        (["~reward@reward.rewards.form", "~reward.weights.form"], {"accuracy": ("exact_match", 1.0)}),
    ],
)
def test_parts_and_weights(overrides: list[str], parts: dict[str, tuple[str, float]]) -> None:
    assert mixed(*overrides) == parts


def test_a_weight_of_nothing_says_how_to_leave_it_out() -> None:
    with pytest.raises(UserError, match=r"write ~reward\.weights\.form"):
        mixed("~reward@reward.rewards.form")


def test_the_form_alone() -> None:
    texts = ["so <answer>4</answer>\n", "<answer>4</answer> or so", "4"]
    assert Form()(prompts=["q"] * 3, completions=texts) == [1.0, 0.0, 0.0]
    told = Form(pattern=r"^\d$", feedback="One digit.")(prompts=["q"] * 2, completions=texts[1:])
    assert told == [{"score": 0.0, "feedback": "One digit."}, {"score": 1.0, "feedback": None}]
    with pytest.raises(UserError, match=r"reward\.pattern='\(' is no regular expression"):
        Form(pattern="(")


@pytest.mark.long
def test_each_parts_mean_is_logged(tmp_path: Path) -> None:
    line = ["reward=mix", r"reward.rewards.form.pattern=\\S", "dry_run=true", "logger=none", "eval=none"]
    line += ["hardware=cpu"]
    done = command([*line, "completions_per_step=8", "rollout.max_completion_tokens=8", "hydra.run.dir=run"], tmp_path)
    assert done.code == 0, done.err
    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert step["reward"] == pytest.approx(step["reward/accuracy"] + 0.2 * step["reward/form"])
    assert step["reward/form"] > 0
