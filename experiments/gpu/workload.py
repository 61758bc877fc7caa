"""What a step has to do: made-up rows, a reward that needs no model that knows anything, and our compositions."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import hydra
from omegaconf import DictConfig

from experiments.gpu.cases import OPD, OWN_TEACHER, Case
from experiments.gpu.device import Device, Work
from experiments.gpu.models import model_folder
from selfdistill import config
from selfdistill.config.conf import CONF
from selfdistill.config.targets import check_targets
from selfdistill.rollout import text_of
from selfdistill.training.arguments import ARGUMENTS

FEEDBACK = "The last line does not follow from the one before it."
# Of conf/experiment, with what makes the work the same as the peer's.
EXPERIMENTS: dict[str, list[str]] = {
    "sft": ["experiment=sft", "num_generations=1"],
    "grpo_supervised": ["experiment=grpo_supervised"],
    "sdft": ["experiment=sdft"],
    "sdpo": ["experiment=sdpo"],
    "sdpo_feedback": ["experiment=sdpo_feedback", "teacher.context.feedback_when=always"],
    "hybrid": ["experiment=hybrid", "teacher.context.feedback_when=always"],
    "gkd": ["experiment=gkd", "rollout.on_policy_fraction=1"],
    # github.com/SemiAnalysisAI/opd-benchmark, benchmarks/opd-frameworks: sampled-token reverse KL, full training.
    OPD: [
        "experiment=gkd", "rollout.on_policy_fraction=1", "alpha=1", "distillation.signal=sampled_token",
        "model.tuning=full", "learning_rate=3e-6", "training.weight_decay=0.01", "seed=42",
    ],
}  # fmt: skip
JUDGED = ("sdpo", "sdpo_feedback", "hybrid")


def work_of(case: Case, device: Device) -> Work:
    """How much there is to do: on a GPU the published numbers for `opd`."""
    if case.work == OPD and device.on_gpu:
        return Work(32, 32, 128, 128, 16, 15)
    return device.work


def first_succeeds(
    prompts: Sequence[Any], completions: Sequence[Any], *, solvable: Sequence[bool], feedback: str = "none", **_: Any
) -> list[Any]:
    """A verdict that takes no luck: of a solvable prompt's completions the first is right, and no other one.

    Args:
        solvable: the rows' column; half of the prompts are.
        feedback: `none` for numbers alone; otherwise something is said about each completion.
    """
    seen: set[str] = set()
    scores = []
    for prompt, can_be_solved in zip(map(text_of, prompts), solvable, strict=True):
        scores.append(float(can_be_solved and prompt not in seen))
        seen.add(prompt)
    return scores if feedback == "none" else [{"score": score, "feedback": FEEDBACK} for score in scores]


def write_rows(file: Path, work: Work, rows: int) -> None:
    """Rows of random words; equal for equal sizes."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(draw.choices(ascii_lowercase, k=4)) for _ in range(count))

    made = []
    for index in range(rows):
        demonstration = words(work.demonstration_words)
        made.append(
            {
                "prompt": words(work.prompt_words),
                "answer": demonstration,
                "golden_response": [demonstration],
                "solvable": index % 2 == 0,
            }
        )
    file.write_text(json.dumps(made))


def overrides(case: Case, device: Device, folder: Path) -> list[str]:
    """Our command line for a case.

    Args:
        folder: holds the models, and gets the rows.
    """
    work = work_of(case, device)
    rows = folder / f"rows-{case.name}.json"
    # As many prompts as the longest run of them needs, and a few more, since the rows are split and drawn in batches.
    write_rows(rows, work, 2 * work.completions_per_step * work.steps + 16)
    given = [
        "model=local", f"model.name={model_folder(case.shape, device, folder)}", "model.local_files_only=true",
        "data=json", f"data.path={rows}", "data.eval_fraction=0.05", "eval=none", "logger=none", "monitors=off",
        f"hardware={device.profile}", "hardware.vllm.mode=null", *device.overrides,
        f"max_steps={work.steps}", f"completions_per_step={work.completions_per_step}",
        f"num_generations={work.num_generations}", f"rollout.max_completion_tokens={work.completion_tokens}",
        "training.checkpoint_every=0", *EXPERIMENTS[case.work],
    ]  # fmt: skip
    if case.work in JUDGED:
        given += ["reward=function", f"reward._target_={__name__}.first_succeeds", "trusted_prefixes=[experiments.gpu]"]
    if case.work in OWN_TEACHER:
        given.append(f"teacher.weights.name={model_folder(case.shape, device, folder, seed=1)}")
    if case.work == OPD and device.on_gpu:  # short texts: many fit into a pass
        given += ["hardware.per_device_batch_size=32", "hardware.gradient_checkpointing=false"]
    if case.sampler == "vllm":
        given += ["hardware.vllm.mode=colocate", f"hardware.vllm.standby={str(device.sleeps).lower()}"]
    return given


def composed(given: Sequence[str]) -> config.Run:
    """The checked run of a command line.

    Raises:
        UserError: it is refused.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg: DictConfig = hydra.compose("train", list(given))
    run = config.check(cfg, list(given))
    check_targets(run, ARGUMENTS)
    return run
