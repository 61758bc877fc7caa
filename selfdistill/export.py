"""Export a finished run again, or to another format.

    python -m selfdistill.export run=outputs/RUN_ID export=merged_16bit [export.dtype=float16] [force=true]

The result lies in RUN_FOLDER/export/FORMAT, with verification.json saying how it compared with the run's weights.
"""

import sys
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from selfdistill.config import doors
from selfdistill.config.conf import CONF
from selfdistill.errors import UserError


@dataclass(frozen=True)
class ExportSettings:
    """Which run is exported, and how; the keys of conf/export_run.yaml, which explains them."""

    run: str
    force: bool
    export: Any  # a mapping with `_target_`
    trusted_prefixes: list[str]

    def __post_init__(self) -> None:
        if self.export is None:
            formats = sorted(path.stem for path in (CONF / "export").glob("*.yaml") if path.stem != "none")
            raise UserError(f"export= is missing: write export=FORMAT, FORMAT one of {', '.join(formats)}.")


def run(cfg: DictConfig) -> None:
    """Load the run, export, verify, and say where the result lies."""
    settings = doors.typed(ExportSettings, cfg)

    from selfdistill.models.export import ExportError
    from selfdistill.runs.finished import load_policy, read_run

    finished = read_run(settings.run, force=settings.force)
    exporter = doors.built(cfg, "export")

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, tokenizer = load_policy(finished)
    folder = finished.folder / "export" / exporter.name
    try:
        exporter.run(model, tokenizer, folder, finished.prompts)
    except ExportError as error:
        print(f"selfdistill: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{folder}\n{(folder / 'verification.json').read_text()}", end="")


def main() -> None:
    doors.main(CONF / "export_run.yaml", run, __doc__)


if __name__ == "__main__":
    main()
