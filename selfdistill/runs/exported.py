"""What a run's summary keeps of its exports, and the command that exports it again."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from selfdistill.config import Run
from selfdistill.models.export import Exported
from selfdistill.runs.folder import RunFolder

EXPORT = "export"


def note_exports(run: RunFolder, exported: Mapping[str, Exported]) -> None:
    """Enters them into summary.json, beside those that were made before."""
    entries = {
        name: {key: str(value) for key, value in asdict(one).items() if value is not None}
        for name, one in exported.items()
    }
    run.update_summary(export={**(run.summary.get(EXPORT) or {}), **entries})


def export_command(run: Run, folder: Path, name: str) -> str:
    """The command that exports a run to this format."""
    trusted = " model.trust_remote_code=true" if run.model.trust_remote_code else ""
    return f"python -m selfdistill.export {shlex.quote(f'run={folder}')} export={name}{trusted}"
