import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from selfdistill import config
from selfdistill.config.schema import Run
from selfdistill.config.targets import targets
from selfdistill.config.values import mismatch
from selfdistill.errors import UserError
from tests.command import CONF, command, composed, groups, options, sampled

# What an option cannot do without.
NEEDS = {
    "data": ["data.path=my.jsonl"],
    "model": ["model.name=my_model"],
    "teacher=model": ["teacher.weights.name=my_model", "reward=none"],
    "teacher=feedback": ["reward=exact_match"],
    "teacher=server": ["teacher.base_url=http://localhost:8000/v1", "teacher.model=my_model"],
    "teacher/weights=model": ["teacher.weights.name=my_model"],
    "teacher/context=feedback": ["reward=exact_match"],
    "reward=none": ["teacher=demonstration"],
    "reward=function": ["reward._target_=selfdistill.rewards.ExactMatch", "reward._partial_=false"],
    "eval=lm_eval": ["eval.tasks=[hellaswag]"],
    "export=lora": ["model.tuning=lora"],
}
OPTIONS = [f"{group}={option}" for group in groups() for option in options(group)]
# Arguments that the configuration leaves out, and why.
LEFT_OUT = {
    "tokenizer": "comes from the model",
    "weights": "a group of its own",
    "context": "a group of its own",
    "feedback": "an evaluation gives none",
    "feedback_characters": "an evaluation gives none",
    "golden_template": "the demonstration's, of generate_data",
    "key_prefix": "for messages of other commands",
}


def needed(option: str) -> list[str]:
    group = option.split("=")[0]
    above = ["teacher=demonstration"] if group.startswith("teacher/") else []
    missing = {"data": option in ("data=jsonl", "data=json", "data=csv", "data=parquet", "data=hub", "data=tooluse")}
    missing["model"] = option == "model=local"
    return [*above, *NEEDS.get(option, []), *(NEEDS[group] if missing.get(group) else [])]


@pytest.mark.parametrize("option", sampled(OPTIONS))
def test_every_option_of_every_group_composes_and_passes(option: str) -> None:
    overrides = [*needed(option), option]
    run = config.check(composed(overrides), overrides)

    from selfdistill.config.targets import check_targets
    from selfdistill.training.arguments import ARGUMENTS

    check_targets(run, ARGUMENTS)


def test_the_defaults_are_the_embedded_model_on_embedded_data() -> None:
    cfg = composed()
    config.check(cfg)
    assert (cfg.model.name, cfg.data.path, cfg.hardware.device) == ("embedded", "embedded:half_known_train", "auto")
    assert cfg.logger._target_ == "selfdistill.runs.loggers.WandbLogger"


def _numbers(kind: Any, path: str = "") -> Iterator[tuple[str, bool]]:
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        if is_dataclass(hint):
            yield from _numbers(hint, f"{path}{field.name}.")
        elif {int, float} & {hint, *get_args(hint)}:
            yield f"{path}{field.name}", "limit" in field.metadata


@pytest.mark.parametrize(("key", "limited"), list(_numbers(Run)))
def test_every_number_has_a_range(key: str, limited: bool) -> None:
    """These two are judged where the group `distillation` refers to them."""
    assert limited != (key in ("alpha", "policy_weight"))


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONF)))
def test_what_is_built_shows_every_argument_it_takes(file: Path) -> None:
    """A key that a class takes and the file does not show could not be set without a plus sign."""
    if file.name == "train.yaml":
        return
    written = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    # What another group's option fills: /reward@rewards.accuracy fills `rewards`.
    filled = {
        key.split("@")[1].split(".")[0] for default in written.get("defaults", []) for key in default if "@" in key
    }
    # What an option takes over from another one of its group: eval/lm_eval has all that eval/default has.
    above = [file.with_name(f"{name}.yaml") for name in written.get("defaults", []) if isinstance(name, str)]
    filled |= {str(key) for other in above if other.exists() for key in OmegaConf.load(other)}
    for where, node in targets(written):
        if node["_target_"] == "???":
            continue
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        assert named - set(node) - filled - set(LEFT_OUT) == set(), where


def test_interpolated_knobs_follow_the_root() -> None:
    overrides = ["teacher=demonstration", "alpha=0.25", "seed=7", "policy_weight=0.5", "group=g", "tags=[a]"]
    cfg = composed([*overrides, "+model.chat_template_kwargs.enable_thinking=false"])
    assert cfg.distillation.alpha == 0.25
    assert cfg.distillation.policy_weight == 0.5
    assert cfg.data.seed == 7
    assert cfg.data.chat_template_kwargs == {"enable_thinking": False}
    assert (cfg.logger.group, cfg.logger.tags) == ("g", ["a"])


@pytest.mark.parametrize("teacher", ["demonstration", "server"])
def test_one_value_of_the_templates_arguments(teacher: str) -> None:
    """From the model to data, evaluation and teacher, unless the teacher has its own."""
    thinks = "+model.chat_template_kwargs.enable_thinking=true"
    overrides = [f"teacher={teacher}", *NEEDS.get(f"teacher={teacher}", []), thinks]
    run = config.check(composed(overrides), overrides)
    assert run.teacher is not None
    assert run.teacher["chat_template_kwargs"] == run.data["chat_template_kwargs"] == {"enable_thinking": True}
    overrides.append("teacher.chat_template_kwargs={enable_thinking: false}")
    cfg = composed(overrides)
    run = config.check(cfg, overrides)
    assert run.teacher is not None
    assert run.teacher["chat_template_kwargs"] == {"enable_thinking": False}
    cfg.data.chat_template_kwargs = {"enable_thinking": False}
    with pytest.raises(UserError, match=r"^data.chat_template_kwargs=.*Write the latter alone"):
        config.check(cfg, overrides)


@pytest.mark.parametrize("teacher", ["feedback", "server"])
def test_one_threshold_of_success(teacher: str) -> None:
    """The routing and the feedback context agree on what a success is."""
    served = ["teacher/context=feedback", "teacher.base_url=http://localhost:1/v1", "teacher.model=m"]
    overrides = ["reward=exact_match", f"teacher={teacher}", *(served if teacher == "server" else [])]
    cfg = composed([*overrides, "distillation.success_threshold=0.5"])
    config.check(cfg, ["distillation.success_threshold=0.5"])
    assert (cfg.distillation.success_threshold, cfg.teacher.context.success_threshold) == (0.5, 0.5)
    cfg = composed([*overrides, "teacher.context.success_threshold=0.5"])
    assert (cfg.distillation.success_threshold, cfg.teacher.context.success_threshold) == (1.0, 0.5)
    assert composed(["teacher=none"]).distillation.success_threshold == 1.0


@pytest.mark.parametrize(
    "overrides",
    [["teacher=demonstration"], ["teacher=feedback", "teacher.context.success_threshold=0.3"]],
)
def test_a_threshold_of_success_that_nothing_reads_is_refused(overrides: list[str]) -> None:
    overrides = ["reward=exact_match", *overrides, "distillation.success_threshold=0.5"]
    with pytest.raises(UserError, match=r"distillation\.success_threshold is set but nothing reads it"):
        config.check(composed(overrides), overrides)


def test_a_knob_that_is_read_passes() -> None:
    for overrides in (
        ["teacher=demonstration", "reward=none", "alpha=0"],
        ["teacher=demonstration", "policy_weight=0.5"],
        ["model.tuning=lora", "model.lora.r=8"],
        ["hardware=gpu_24gb", "hardware.vllm.gpu_memory_utilization=0.5"],
    ):
        config.check(composed(overrides), overrides)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("experiment=sdft", "sdft"),
        ("reward=inverse_loss teacher=none", "inverse_loss"),
        ("reward=exact_match teacher=feedback", "exact_match-feedback"),
        ("name=mine experiment=sdft", "mine"),
    ],
)
def test_a_run_is_called_by_what_it_is(line: str, name: str) -> None:
    choices = dict(part.split("=") for part in line.split())
    run = config.check(composed(line.split()))
    assert config.run_name(run, {k: v for k, v in choices.items() if k != "name"}) == name


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (1, int, None),
        (True, int, "a whole number"),
        (1, float, None),
        (1.5, int, "a whole number"),
        ("a", float | None, "a number or null"),
        (None, float | None, None),
        (None, bool, "true or false"),
        (["a"], list[str], None),
        ([1], list[str], "a list of texts"),
        ("x", Literal["a", "b"], "a or b"),
        ("a", Literal["a", "b"], None),
        ({}, dict[str, Any], None),
        ("anything", Any, None),
        ("anything", Path, None),
    ],
)
def test_mismatch(value: Any, hint: Any, wanted: str | None) -> None:
    assert mismatch(value, hint) == wanted


def test_help_lists_every_option_with_what_it_is(tmp_path: Path) -> None:
    outcome = command(["--help"], tmp_path)
    assert (outcome.code, outcome.err, outcome.left) == (0, "", set())
    listed = re.findall(r"^  (\w+) +(\S.*)$", outcome.out, flags=re.M)
    assert {name for name, _ in listed} >= {option.split("=")[1] for option in OPTIONS}
    assert "_base" not in outcome.out
    for group in groups():
        assert f"\n{group}=\n" in outcome.out
    assert "max_steps: 100" in outcome.out
    assert "hydra:" not in outcome.out


def test_cfg_prints_the_composed_configuration(tmp_path: Path) -> None:
    outcome = command(["experiment=sdft", "--cfg", "job", "seed=3"], tmp_path)
    assert (outcome.code, outcome.err, outcome.left) == (0, "", set())
    assert "seed: 3" in outcome.out
    assert "selfdistill.teachers.Teacher" in outcome.out


@pytest.mark.parametrize(
    "line",
    [
        "--check",
        pytest.param("check=true", marks=pytest.mark.long),
        pytest.param("teacher=demonstration reward=none --check", marks=pytest.mark.long),
        "model=qwen3_0_6b hardware=gpu_24gb export=lora data=jsonl data.path=my.jsonl --check",
    ],
)
def test_check_shows_the_plan_and_leaves_nothing(line: str, tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text("".join(f'{{"prompt": "a{i}", "answer": "b"}}\n' for i in range(10)))
    outcome = command(line.split(), tmp_path)
    assert (outcome.code, outcome.err, outcome.left) == (0, "", set())
    assert re.search(r"^peak +about", outcome.out, flags=re.M)
    assert re.search(r"^the run +100 steps = 3,200 completions", outcome.out, flags=re.M)
    if "qwen" in line:  # neither the model nor the GPU is here
        assert "note: model.name=Qwen/Qwen3-0.6B is not on this machine" in outcome.out
        assert ("torch sees no GPU here" in outcome.out) != Path("/dev/nvidia0").exists()
    else:
        assert "400 rows to train on, 200 held out" in outcome.out
    assert re.search(r"^judge +exact_match", outcome.out, flags=re.M)
    assert "no weights were loaded, nothing was written" in outcome.out


LIGHT = """
import contextlib, io, sys
from selfdistill import train
combinations = ["reward=none", "reward=none teacher=feedback", "export=lora", "num_generations=7"]
for line in ("--help", "--cfg job", "betta=1", "beta=-1", "-m beta=0,-1", *combinations):
    arguments = line.split()
    sys.argv = ["train", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            train.main()
        except SystemExit:
            pass
heavy = {"torch", "transformers", "trl", "peft", "datasets", "wandb", "accelerate", "numpy"} & sys.modules.keys()
print(heavy or "light")
"""


def test_answers_without_heavy_imports(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(CONF.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("light", "")
    assert not list(tmp_path.iterdir())
