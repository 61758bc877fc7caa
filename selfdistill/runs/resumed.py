"""The configuration of a run that is continued. No heavy imports: a wrong folder is answered at once."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from selfdistill import config
from selfdistill.config.permissions import granted_again
from selfdistill.errors import UserError
from selfdistill.runs.folder import RunFolder


def resumed_config(
    cfg: DictConfig, overrides: Sequence[str], hydra_config: DictConfig
) -> tuple[DictConfig, config.Run]:
    """The configuration of the run that `resume` names, and the run, checked as any other is.

    Of the command line only `max_steps` and `check` may differ. What runs code of others, and secrets, which are not
    recorded, are given again.

    Raises:
        UserError: not a run's folder, a configuration that does not pass or needs a grant, or another key beside it.
    """
    if folder := OmegaConf.select(hydra_config, "run.folder"):
        raise UserError(f"hydra.run.dir={folder} cannot be given with resume={cfg.resume}: the run keeps its folder.")
    saved = RunFolder.open(Path(cfg.resume), write=False).config
    again = granted_again(saved, cfg, overrides, f"resume={cfg.resume}")
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if key not in ("resume", "max_steps", "check", *again):
            raise UserError(
                f"{key} cannot be changed when a run is resumed: its configuration is in {cfg.resume}/config.yaml."
            )
    saved.resume, saved.check = cfg.resume, cfg.check
    if any(o.startswith("max_steps=") for o in overrides):
        saved.max_steps = cfg.max_steps
    try:
        return saved, config.check(saved)
    except UserError as error:
        raise UserError(f"{cfg.resume}/config.yaml: {error}") from None
