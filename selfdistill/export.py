"""Export a finished run again, to other formats, or one of its checkpoints.

    python -m selfdistill.export run=outputs/RUN_ID export=merged_16bit [export.dtype=float16]
    python -m selfdistill.export run=outputs/RUN_ID export=[lora,gguf] export.type=q4_k_m
    python -m selfdistill.export run=outputs/RUN_ID checkpoint=50 export=lora export.push_to=OWNER/NAME

Each result lies in RUN_FOLDER/export/FORMAT, a checkpoint's in RUN_FOLDER/export/checkpoint-50/FORMAT, with
verification.json saying how it compared with the run's weights. A format that fails doesn't keep the others back.
"""

import sys
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from selfdistill.config import doors
from selfdistill.config.conf import CONF
from selfdistill.errors import UserError


@dataclass  # a frozen one could not be merged with the configuration
class Granted:
    """What the run's model may do."""

    trust_remote_code: bool


@dataclass(frozen=True)
class ExportSettings:
    """Which run is exported, and how; the keys of conf/export_run.yaml, which explains them."""

    run: str
    checkpoint: str | None
    force: bool
    export: Any  # a mapping with `_target_`
    trusted_prefixes: list[str]
    model: Granted

    def __post_init__(self) -> None:
        if self.export is None:
            formats = sorted(path.stem for path in (CONF / "export").glob("[a-z]*.yaml") if path.stem != "none")
            raise UserError(f"export= is missing: write export=FORMAT, FORMAT one of {', '.join(formats)}.")


def run(cfg: DictConfig) -> None:
    """Load the run, export, verify, and say where the results lie."""
    settings = doors.typed(ExportSettings, cfg)

    from selfdistill.runs.exported import note_exports
    from selfdistill.runs.finished import load_policy, read_run
    from selfdistill.runs.folder import RunFolder

    trusted = settings.model.trust_remote_code
    finished = read_run(settings.run, checkpoint=settings.checkpoint, force=settings.force, trusted=trusted)
    exports = doors.built(cfg, "export")
    if len(exports.missing()) == len(exports.formats):  # before weights load
        raise UserError(" ".join(exports.missing()))

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, tokenizer = load_policy(finished)
    done = exports.run(
        model,
        tokenizer,
        finished.exports,
        finished.prompts,
        card=finished.card,
        chat_template_kwargs=finished.model.get("chat_template_kwargs"),
        tell=lambda line: print(line, file=sys.stderr),
    )
    if not settings.checkpoint and not settings.force:
        note_exports(RunFolder.open(finished.folder, write=False), done)
    for name, one in done.items():
        if one.error is None:
            assert one.folder is not None
            print(f"{one.folder}\n{(one.folder / 'verification.json').read_text()}", end="")
            print(one.url or "", end="\n" if one.url else "")
        else:
            print(f"selfdistill: {name}: {one.error}", file=sys.stderr)
    if any(one.error is not None for one in done.values()):
        raise SystemExit(1)


def main() -> None:
    doors.main(CONF / "export_run.yaml", run, __doc__)


if __name__ == "__main__":
    main()
