"""Lays out a saved W&B workspace and a report for the runs of a group.

    python -m selfdistill.workspace group=multirun-20260102-030405
    python -m selfdistill.workspace group=beta-study by=[experiment,beta] swept=[beta,learning_rate]

Curves of reward, accuracy, retention and divergence over steps, generated tokens and seconds, new skill against old
ones, parallel coordinates over what was swept; runs are grouped by setting. Without an account it writes what it would
send.
"""

from dataclasses import dataclass

from omegaconf import DictConfig

from selfdistill.config import doors
from selfdistill.config.conf import CONF
from selfdistill.errors import UserError


@dataclass(frozen=True)
class WorkspaceSettings:
    """Which runs are laid out, and how; the keys of conf/workspace.yaml, which explains them."""

    group: str
    project: str
    entity: str | None
    name: str | None
    by: list[str]
    swept: list[str]
    output: str
    timeout_s: float

    def __post_init__(self) -> None:
        if not self.swept:
            raise UserError("swept=[] leaves the parallel coordinates without an axis: name a key, e.g. swept=[beta].")
        if self.timeout_s <= 0:
            raise UserError(f"timeout_s={self.timeout_s:g}: write a number of seconds above 0.")


def run(cfg: DictConfig) -> None:
    """Lay out, send or write, and say where."""
    settings = doors.typed(WorkspaceSettings, cfg)

    from selfdistill.runs.loggers import layout

    name = settings.name or settings.group
    shown = layout.Layout(settings.group, settings.project, name, settings.by, settings.swept)
    for line in layout.send(shown, settings.entity, settings.output, settings.timeout_s):
        print(line)


def main() -> None:
    doors.main(CONF / "workspace.yaml", run, __doc__)


if __name__ == "__main__":
    main()
