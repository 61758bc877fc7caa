"""The entrypoint: compose, check, build, run, export.

    python -m selfdistill.train experiment=sdft model=qwen3_0_6b hardware=gpu_24gb data=jsonl data.path=my.jsonl

Hydra composes the run from selfdistill/conf. Nothing heavy is imported before the configuration has passed.
"""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from selfdistill import config
from selfdistill.errors import UserError


def run(cfg: DictConfig) -> float | None:
    """One run from its composed configuration; returns the final held-out accuracy, which a sweeper may maximise."""
    hydra_config = HydraConfig.get()
    config.check(cfg, list(hydra_config.overrides.task))

    from selfdistill import build, session

    if cfg.resume:
        cfg = session.resumed_config(cfg, list(hydra_config.overrides.task))
    build.check_targets(cfg)
    if cfg.check:
        return session.show_plan(cfg)
    with session.recorded(cfg, hydra_config) as record:
        parts = build.build(cfg, record.folder)
        record.begin(parts)
        session.train(parts, record)
        record.end(parts)
    return record.final_accuracy


def main() -> None:
    sys.argv = ["check=true" if argument == "--check" else argument for argument in sys.argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed as tracebacks
    try:
        hydra.main(version_base="1.3", config_path="conf", config_name="train")(run)()
    except UserError as error:
        raise SystemExit(config.fail(str(error))) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise SystemExit(config.fail(config.explain(error, sys.argv[1:]))) from None


if __name__ == "__main__":
    main()
