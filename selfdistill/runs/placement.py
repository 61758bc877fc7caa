"""Where a run goes, and what Hydra's users look for in its folder.

`hydra.run.dir` is the run's own folder, and so is `hydra.sweep.dir`/`hydra.sweep.subdir` where a subdir is given;
`hydra.sweep.dir` holds a sweep's runs, and `output_dir` the others.
"""

from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from selfdistill.config import Run, run_name
from selfdistill.config.secrets import MASK, Redactor, is_secret_key
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.labels import labels_of
from selfdistill.runs.provenance import provenance_files
from selfdistill.runs.sweep import overrides_of
from selfdistill.runs.sweep_folder import SweepFolder


def new_run(cfg: DictConfig, run: Run, hydra_config: DictConfig) -> RunFolder:
    """The folder of a new run, with `.hydra/` in it: overrides.yaml, config.yaml and hydra.yaml, secrets masked.

    Raises:
        UserError: the folder cannot be made, or is not empty.
    """
    root, path = destination(cfg, hydra_config)
    redactor = Redactor(cfg)
    overrides = overrides_of(hydra_config)
    masks = dict(zip(overrides, redactor.arguments(overrides), strict=True))

    def masked(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: MASK if isinstance(v, str) and is_secret_key(str(k)) else masked(v) for k, v in value.items()}
        if isinstance(value, list):
            return [masked(item) for item in value]
        if not isinstance(value, str):
            return value
        for override, mask in masks.items():
            value = value.replace(override, mask)
        return redactor.text(value)

    def companions(folder: Path) -> dict[str, str]:
        hydra: Any = OmegaConf.to_container(hydra_config, resolve=False, enum_to_str=True)
        if run.repeat:  # what was composed is the repeated run's
            hydra["runtime"]["choices"] = labels_of(Path(run.repeat)).choices or hydra["runtime"]["choices"]
        hydra["run"] = {"dir": str(folder)}
        hydra["runtime"]["output_dir"] = str(folder.absolute())
        return {
            ".hydra/overrides.yaml": OmegaConf.to_yaml(OmegaConf.create(masked(overrides))),
            ".hydra/hydra.yaml": OmegaConf.to_yaml(OmegaConf.create(masked({"hydra": hydra}))),
            ".hydra/config.yaml": redactor.yaml(),
            **provenance_files(folder, cfg, run),
        }

    return RunFolder.create(root, run_name(run, hydra_config.runtime.choices), cfg, path, companions)


def destination(cfg: DictConfig, hydra_config: DictConfig) -> tuple[Path, Path | None]:
    """The folder that holds runs, and the run's own where Hydra's keys name it."""
    if hydra_config.mode != RunMode.MULTIRUN:
        folder = hydra_config.run.get("folder")
        return Path(cfg.output_dir), Path(folder) if folder else None
    sweep = hydra_config.sweep
    if sweep.subdir == ".":
        return Path(sweep.dir), None
    path = first = Path(sweep.dir, str(sweep.subdir))
    before, count = SweepFolder(sweep.dir).jobs().get(int(hydra_config.job.num)), 1
    while before is not None and before.run is not None and path.exists() and any(path.iterdir()):
        count += 1  # a job that failed is repeated, and what it left stays
        path = first.with_name(f"{first.name}-{count}")
    return Path(sweep.dir), path
