"""A run's folder, read back: its configuration, its final weights, prompts to compare answers on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from selfdistill.errors import UserError
from selfdistill.rollout import Prompt
from selfdistill.runs.folder import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = 8


@dataclass(frozen=True)
class FinishedRun:
    """What an export needs of a run.

    Attributes:
        folder: the run's folder.
        model: its configuration group `model`, resolved.
        weights: the folder of its final weights, or of its newest checkpoint; an adapter or a whole model.
        prompts: up to eight different prompts of its recorded samples; empty where there are none.
    """

    folder: Path
    model: dict[str, Any]
    weights: Path
    prompts: list[Prompt]


def read_run(folder: str | Path, *, force: bool = False) -> FinishedRun:
    """Find what the export needs; nothing heavy is loaded.

    Args:
        force: also accept a run that is not over.

    Raises:
        UserError: no such folder, not a run, not over yet, or without weights.
    """
    run = RunFolder.open(Path(folder), write=False)
    model = OmegaConf.to_container(run.config, resolve=True).get("model")  # type: ignore[union-attr]
    if not isinstance(model, dict) or not model.get("name"):
        raise UserError(f"{run.path / 'config.yaml'} has no model.name, so it is not the configuration of a run.")
    if not force and run.is_running:
        raise UserError(
            f"run={folder} is still running. Wait until it is over; force=true exports its newest checkpoint as it is."
        )
    prompts = {json.dumps(line["prompt"]): line["prompt"] for line in run.completions() if line.get("prompt")}
    return FinishedRun(run.path, model, _weights(run.path), list(prompts.values())[:PROMPTS])


def _weights(folder: Path) -> Path:
    names = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
    if any((folder / "model" / name).is_file() for name in names):
        return folder / "model"
    from selfdistill.training.checkpoints import newest_checkpoint

    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise UserError(
            f"run={folder} has no weights: neither model/ nor a complete checkpoints/checkpoint-N/ is there."
        )
    return checkpoint


def load_policy(run: FinishedRun) -> "tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]":
    """The run's trained model, its adapter on its base, and the tokenizer it was trained with."""
    from transformers import AutoTokenizer

    from selfdistill.models.loading import load_configured

    arguments = dict(run.model)
    if (run.weights / "adapter_config.json").is_file():
        arguments["adapter_path"] = str(run.weights)
    else:
        arguments |= {"name": str(run.weights.resolve()), "tuning": "full", "lora": None, "revision": None}
    model, tokenizer = load_configured(arguments)
    if (run.weights / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(run.weights)
    return model, tokenizer
