"""Trains: a run is composed from conf, checked, built, trained, recorded and exported.

  python -m selfdistill.train                               the embedded model on whatever machine this is
  python -m selfdistill.train experiment=sdft seed=1        a published method
  python -m selfdistill.train model=qwen3_0_6b hardware=gpu_24gb data=jsonl data.path=my.jsonl export=lora
  python -m selfdistill.train --multirun experiment=sdpo beta=0,0.04 alpha=0,0.5,1
  python -m selfdistill.train resume=outputs/RUN            continue a run
  python -m selfdistill.train repeat=outputs/RUN            the same run once more
  python -m selfdistill.train sweep=sdpo                    a sweep of conf/sweep, which is --multirun with its keys
  python -m selfdistill.train resume_sweep=outputs/multirun/SWEEP    its jobs that are not finished

--check          compose and check everything, show the plan, and stop
--multirun, -m   one run for each combination of the values that are given with commas
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from selfdistill import config
from selfdistill.config import doors
from selfdistill.config.conf import CONF
from selfdistill.config.messages import explain, fail
from selfdistill.config.values import check_kind
from selfdistill.errors import UserError
from selfdistill.runs import preflight, provenance, sweep
from selfdistill.runs.folder import RunFolder


def run(cfg: DictConfig) -> float | None:
    """One run from its composed configuration; returns the value of its `objective`, which a sweeper may maximise."""
    hydra_config: Any = HydraConfig.get()  # a DictConfig, though Hydra declares a dataclass
    overrides = sweep.overrides_of(hydra_config)
    with sweep.job(cfg) as job:
        if job.is_over:
            return job.objective
        for key in ("resume", "repeat"):  # read before the rest is checked
            check_kind(key, cfg[key], str | None)
        if cfg.resume:
            stored = preflight.look_for_run(cfg.resume, hydra_config)
        elif cfg.repeat:
            cfg, checked, notes = provenance.repeated_config(cfg, overrides)
            preflight.look_for_files(checked)
            for note in notes:
                print(f"not as in {cfg.repeat}: {note}")
        else:
            checked = config.check(cfg, overrides)
            preflight.look_for_files(checked)

        # Nothing heavy is imported before the configuration has passed.
        if not cfg.check:
            preflight.prepare_imports(stored if cfg.resume else cfg)
        from selfdistill.config.targets import check_targets
        from selfdistill.runs import plan, sequence, session
        from selfdistill.training.arguments import ARGUMENTS

        if cfg.resume:
            cfg, checked = session.resumed_config(cfg, overrides)
        check_targets(checked, ARGUMENTS)
        if checked.check:
            plan.show_plan(*sequence.first_stage(cfg, checked))
            return None
        if checked.tasks:
            sequence.train(cfg, checked, hydra_config, _train, job.begin)
        else:
            _train(cfg, checked, hydra_config, job.begin)
    return job.objective


def _train(
    cfg: DictConfig,
    run: config.Run,
    hydra_config: Any,
    begun: Callable[[RunFolder], None] = lambda folder: None,
    ready: Callable[[Any], None] = lambda parts: None,
) -> None:
    """One run, from its folder to its export.

    Args:
        begun: is given the folder.
        ready: is given the parts, before the training.
    """
    from selfdistill.runs import cards, plan, session
    from selfdistill.training.build import build

    plan.check_memory(run)
    with session.recorded(cfg, run, hydra_config) as this:
        begun(this.folder)
        parts = build(run, this.folder.path, this.at_end)
        ready(parts)
        parts.trainer.card = cards.card_of(asdict(run), this.folder, len(parts.data.train))
        this.begin(parts)
        this.train(parts)
        this.end(parts)


def main() -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of every process; read when torch is imported
    try:
        sys.argv[1:] = sweep.command_line(sys.argv[1:])
    except UserError as error:
        raise SystemExit(fail(explain(error))) from None
    with sweep.searching():
        doors.main(CONF / "train.yaml", run, __doc__, sweeps=True)


if __name__ == "__main__":
    main()
