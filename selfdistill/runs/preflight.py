"""What a wrong path is told before anything heavy is imported: files and folders that the configuration names."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from selfdistill.config import Run
from selfdistill.config.values import check_kind
from selfdistill.data.sources import EMBEDDED_PREFIX, open_source
from selfdistill.errors import UserError
from selfdistill.models.location import look_for_model
from selfdistill.runs.folder import RunFolder
from selfdistill.training.engine import COLOCATED
from selfdistill.training.unsloth import import_unsloth

OUR_DATA = "selfdistill.data.load_data"


def look_for_run(folder: str, hydra_config: DictConfig) -> DictConfig:
    """The configuration of the run whose folder `resume` names; Hydra must name no other one.

    Raises:
        UserError: it does not.
    """
    if other := OmegaConf.select(hydra_config, "run.folder"):
        raise UserError(f"hydra.run.dir={other} cannot be given with resume={folder}: a run keeps its folder.")
    return RunFolder.open(Path(folder), write=False).config


def prepare_imports(cfg: DictConfig) -> None:
    """What has to stand before TRL is imported: the environment of vLLM's engine, and unsloth.

    Raises:
        UserError: unsloth cannot be used here.
    """
    read = partial(OmegaConf.select, cfg)
    if read("hardware.vllm.mode") == "colocate":
        for name, value in COLOCATED.items():
            os.environ.setdefault(name, value)
        if read("hardware.vllm.standby"):
            os.environ.setdefault("UNSLOTH_VLLM_STANDBY", "1")
    if read("model.loader") == "unsloth":
        import_unsloth()


def look_for_files(run: Run) -> None:
    """Whether the files and folders that a run reads are there; what is on the hub is not asked for.

    Raises:
        UserError: the first one that is not.
    """
    for key, node in run.sources.items():
        if node["_target_"] == OUR_DATA:  # a loader of one's own may mean anything by a path
            _look_for_data(key, node)
    if (path := run.model.retention_path) and not path.startswith(EMBEDDED_PREFIX):
        open_source(path, key="model.retention_path")
    local = run.model.local_files_only
    look_for_model(run.model.name, "model.name", local_files_only=local)
    if (adapter := run.model.adapter_path) and not (Path(adapter) / "adapter_config.json").is_file():
        raise UserError(f"model.adapter_path={adapter}: there is no adapter_config.json in that folder.")
    teacher = ((run.teacher or {}).get("weights") or {}).get("name")
    if isinstance(teacher, str):
        look_for_model(teacher, "teacher.weights.name", local_files_only=local)


def _look_for_data(at: str, data: dict[str, Any]) -> None:
    from selfdistill.data.sources import EXTENSIONS

    for key in ("path", "eval_path", "format"):
        check_kind(f"{at}.{key}", data.get(key), str | None)  # the other arguments wait for an import
    for key in ("path", "eval_path"):
        if path := data.get(key):
            known = key == "eval_path" and Path(path).suffix.lower() in EXTENSIONS
            open_source(path, key=f"{at}.{key}", format=None if known else data.get("format"))
