"""A run's folder, read back: its configuration, its final weights, prompts to compare answers on."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from selfdistill.config.permissions import asked_for, check_granted
from selfdistill.errors import UserError
from selfdistill.models.card import Card
from selfdistill.rollout import Prompt
from selfdistill.runs.cards import card_for_export, card_of
from selfdistill.runs.exported import EXPORT
from selfdistill.runs.folder import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = 8
CHECKPOINTS = "checkpoints"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class FinishedRun:
    """What an export needs of a run.

    Attributes:
        folder: the run's folder.
        model: its configuration group `model`, resolved.
        weights: the folder of its final weights, or of its newest checkpoint; an adapter or a whole model.
        prompts: up to eight different prompts of its recorded samples; empty where there are none.
        card: what the page of an export says of the run.
        name: of the checkpoint that was asked for; empty otherwise.
    """

    folder: Path
    model: dict[str, Any]
    weights: Path
    prompts: list[Prompt]
    card: Card
    name: str = ""

    @property
    def exports(self) -> Path:
        """Where its exports lie."""
        return self.folder / EXPORT / self.name


def read_run(
    folder: str | Path, *, checkpoint: str | None = None, force: bool = False, trusted: bool = False
) -> FinishedRun:
    """Find what the export needs; nothing heavy is loaded.

    Args:
        checkpoint: a step, such as 50, or a checkpoint's folder; None: the final weights, else the newest checkpoint.
        force: also accept a run that is not over.
        trusted: whether its model may bring code of its own (`model.trust_remote_code`).

    Raises:
        UserError: no such folder, not a run, not over yet, without weights, or code of its own that is not granted.
    """
    run = RunFolder.open(Path(folder), write=False)
    config: Any = OmegaConf.to_container(run.config, resolve=True)
    model = config.get("model")
    if not isinstance(model, dict) or not model.get("name"):
        raise UserError(f"{run.path / 'config.yaml'} has no model.name, so it is not the configuration of a run.")
    check_granted(asked_for({"model": model}), {"model.trust_remote_code": trusted}, f"run={folder}")
    if not force and run.is_running:
        raise UserError(
            f"run={folder} is still running. Wait until it is over; force=true exports its newest checkpoint as it is."
        )
    weights = _weights(run.path) if checkpoint is None else _checkpoint(run.path, checkpoint)
    name, began = str(model["name"]), Path(run.summary.get("folder") or "")
    if not Path(name).exists() and (began / name).is_dir():  # relative to where the run was started
        model["name"] = str(began / name)
    card = card_of(config, run, run.summary.get("train_rows"))
    card = card_for_export(card, run, evaluated=weights == run.path / "model")
    if weights != run.path / "model":
        card = replace(card, facts={**card.facts, "weights": f"`{weights.name}`"})
    prompts = {json.dumps(line["prompt"]): line["prompt"] for line in run.completions() if line.get("prompt")}
    samples = list(prompts.values())[:PROMPTS]
    return FinishedRun(run.path, model, weights, samples, card, "" if checkpoint is None else weights.name)


def _checkpoint(run: Path, wanted: str) -> Path:
    folders = [run / CHECKPOINTS / f"checkpoint-{wanted}", run / CHECKPOINTS / wanted, run / wanted, Path(wanted)]
    found = next((folder for folder in folders if any((folder / name).is_file() for name in WEIGHTS)), None)
    if found is None:
        there = sorted(path.name for path in (run / CHECKPOINTS).glob("checkpoint-*"))
        raise UserError(
            f"checkpoint={wanted}: there are no weights of that name in {run / CHECKPOINTS}, which holds "
            f"{', '.join(there) or 'nothing'}."
        )
    return found.absolute()


def _weights(folder: Path) -> Path:
    if any((folder / "model" / name).is_file() for name in WEIGHTS):
        return folder / "model"
    from selfdistill.training.checkpoints import newest_checkpoint  # imports torch

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
