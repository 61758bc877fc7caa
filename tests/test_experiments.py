"""Every experiment: what it is composed of, kept in tests/configs, and two steps of it.

After a change that is meant, write the files again and read the difference:

    python -m tests.test_experiments
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from selfdistill import config
from selfdistill.models.loading import resolve
from selfdistill.runs.loggers import flat
from tests.command import command, composed, options
from tests.teachers.server.stub_server import StubServer

KEPT = Path(__file__).parent / "configs"
EXPERIMENTS = options("experiment")
SHORT = [
    "debug=fast",
    "eval=none",
    "hardware=cpu",
    "completions_per_step=8",
    "rollout.max_completion_tokens=16",
]


def flattened(experiment: str) -> str:
    """The resolved configuration as sorted lines `a.b.c: value`, values as JSON."""
    cfg = composed([f"experiment={experiment}"])
    values = flat(OmegaConf.to_container(cfg, resolve=True))
    return "".join(f"{key}: {json.dumps(values[key], ensure_ascii=False)}\n" for key in sorted(values))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_is_composed_as_kept(experiment: str) -> None:
    """What users get does not change unseen."""
    kept = KEPT / f"{experiment}.yaml"
    assert kept.exists(), "python -m tests.test_experiments writes it"
    assert flattened(experiment).splitlines() == kept.read_text(encoding="utf-8").splitlines()


def test_nothing_is_kept_of_experiments_that_are_gone() -> None:
    assert sorted(file.stem for file in KEPT.glob("*.yaml")) == EXPERIMENTS


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_header_says_what_it_is(experiment: str) -> None:
    """The paper, the direction of the divergence, and how it departs from the paper."""
    from tests.command import CONF

    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    for word in ("Paper:", "KL direction:", "Departures"):
        assert word in header
    assert len(lines) <= 25


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_passes_every_check(experiment: str) -> None:
    overrides = [f"experiment={experiment}"]
    config.check(composed(overrides), overrides)


@pytest.fixture
def served(experiment: str) -> Iterator[list[str]]:
    """Where its teacher is, if it is behind a server: the embedded model."""
    if "base_url" not in (composed([f"experiment={experiment}"]).teacher or {}):
        yield []
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve("embedded")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with StubServer(name="teacher").speak_for(model, tokenizer) as stub:
        yield [f"teacher.base_url={stub.url}"]


@pytest.mark.parametrize(
    "experiment", [e if e == "sdpo_feedback" else pytest.param(e, marks=pytest.mark.long) for e in EXPERIMENTS]
)
def test_two_steps(experiment: str, served: list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    outcome = command([f"experiment={experiment}", *served, *SHORT], tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    (run,) = (tmp_path / "outputs").iterdir()
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewarded = composed([f"experiment={experiment}"]).reward is not None
    assert {"reward" in step for step in steps} == {rewarded}
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (resolve("embedded"), run / "model"))
    moved = [name for name in after if not after[name].equal(before[name])]
    assert moved, "two steps changed no weight"


if __name__ == "__main__":
    KEPT.mkdir(exist_ok=True)
    for name in EXPERIMENTS:
        (KEPT / f"{name}.yaml").write_text(flattened(name), encoding="utf-8")
    for file in KEPT.glob("*.yaml"):
        if file.stem not in EXPERIMENTS:
            file.unlink()
