"""The entrypoint: compose, check, build, run, export.

    python -m selfdistill.train experiment=sdft model=qwen3_0_6b hardware=gpu_24gb data=jsonl data.path=my.jsonl

Hydra composes the run from conf. Nothing heavy is imported before the configuration has passed.
"""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from selfdistill import config
from selfdistill.config.conf import CONF
from selfdistill.errors import UserError
from selfdistill.runs import sweep


def run(cfg: DictConfig) -> float | None:
    """One run from its composed configuration; returns the final held-out accuracy, which a sweeper may maximise."""
    hydra_config = HydraConfig.get()
    overrides = sweep.overrides_of(hydra_config)
    with sweep.job(cfg) as job:
        checked = config.check(cfg, overrides)

        from selfdistill.config.targets import check_targets
        from selfdistill.runs import session
        from selfdistill.training import build
        from selfdistill.training.arguments import ARGUMENTS

        if checked.resume:
            cfg, checked = session.resumed_config(cfg, overrides)
        check_targets(checked, ARGUMENTS)
        if checked.check:
            session.show_plan(cfg, checked)
            return None
        with session.recorded(cfg, checked, hydra_config) as record:
            job.folder = record.folder
            parts = build.build(checked, record.folder.path)
            record.begin(parts)
            session.train(parts, record)
            record.end(parts)
        return record.final_accuracy
    return None


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of being printed as tracebacks
    try:
        sys.argv[1:] = config.command_line(sys.argv[1:])
        with sweep.reported():
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(run)()
    except (UserError, *config.COMPOSITION_ERRORS) as error:
        raise SystemExit(config.fail(config.explain(error))) from None


if __name__ == "__main__":
    main()
