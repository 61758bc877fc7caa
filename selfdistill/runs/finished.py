"""A run's folder, read back: its configuration, its final weights, prompts to compare answers on."""

import fcntl
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdistill.errors import UserError


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
    prompts: list[Any]


def read_run(folder: str | Path, *, force: bool = False) -> FinishedRun:
    """Find what the export needs; nothing heavy is loaded.

    Args:
        force: also accept a run that is not over.

    Raises:
        UserError: no such folder, not a run, not over yet, or without weights.
    """
    from omegaconf import OmegaConf

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"run={folder}: there is no such folder.")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run={folder} is not the folder of a run: it has no config.yaml. Write run=outputs/RUN_ID.")
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    except Exception as error:  # yaml and omegaconf each have their own family of errors
        raise UserError(f"{folder / 'config.yaml'} cannot be read: {error}") from error
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not model.get("name"):
        raise UserError(f"{folder / 'config.yaml'} has no model.name, so it is not the configuration of a run.")
    if not force and _is_running(folder):
        raise UserError(
            f"run={folder} is still running. Wait until it is over; force=true exports its newest checkpoint as it is."
        )
    return FinishedRun(folder, {str(key): value for key, value in model.items()}, _weights(folder), _prompts(folder))


def _is_running(folder: Path) -> bool:
    """Neither over according to its summary, nor has its process let go of the folder's lock by dying."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except FileNotFoundError:
        return True
    except ValueError as error:
        raise UserError(f"{folder / 'summary.json'} is not JSON: {error}.") from error
    if summary.get("status") in ("finished", "failed", "interrupted", "stopped"):
        return False
    if not (folder / ".lock").is_file():
        return True
    with (folder / ".lock").open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _weights(folder: Path) -> Path:
    if _has_weights(folder / "model"):
        return folder / "model"
    # The trainer writes its state after the weights: a checkpoint without it was cut off.
    checkpoints = [
        path
        for path in (folder / "checkpoints").glob("checkpoint-*")
        if path.name.split("-")[-1].isdigit() and _has_weights(path) and (path / "trainer_state.json").is_file()
    ]
    if not checkpoints:
        raise UserError(
            f"run={folder} has no weights: neither model/ nor a complete checkpoints/checkpoint-N/ is there."
        )
    return max(checkpoints, key=lambda path: int(path.name.split("-")[-1]))


def _has_weights(path: Path) -> bool:
    names = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
    return any((path / name).is_file() for name in names)


def _prompts(folder: Path, limit: int = 8) -> list[Any]:
    samples = folder / "completions.jsonl"
    if not samples.is_file():
        return []
    found: dict[str, Any] = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):  # a line cut off by a kill says nothing about the run's weights
            continue
        if prompt:
            found.setdefault(json.dumps(prompt), prompt)
        if len(found) == limit:
            break
    return list(found.values())


def load_policy(run: FinishedRun) -> tuple[Any, Any]:
    """The run's trained model, its adapter on its base, and the tokenizer it was trained with."""
    from transformers import AutoTokenizer

    from selfdistill.models.loading import load_model

    # The group also holds keys that others read.
    accepted = inspect.signature(load_model).parameters
    arguments = {key: value for key, value in run.model.items() if key in accepted}
    if (run.weights / "adapter_config.json").is_file():
        arguments["adapter_path"] = str(run.weights)
    else:
        arguments |= {"name": str(run.weights.resolve()), "tuning": "full", "lora": None, "revision": None}
    model, tokenizer = load_model(**arguments)
    if (run.weights / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(run.weights)
    return model, tokenizer
