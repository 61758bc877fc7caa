"""How the runs of a group are laid out in W&B: a workspace, whose panels are live, and a report to send around."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdistill.errors import UserError
from selfdistill.files import write_atomically
from selfdistill.runs.loggers.base import X_AXES
from selfdistill.runs.loggers.wandb import within

# What the summary of a run that was evaluated at its end holds.
ACCURACY, RETENTION = "after/accuracy", "after/retention"
# Titles of the curves, and the metrics under them.
CURVES = {
    "reward": "reward",
    "accuracy on the new skill": "eval/accuracy",
    "retention of the old skills": "eval/retention",
    "divergence from the teacher": "distill/divergence",
}
HEALTH = {
    "entropy (nats)": "monitor/entropy",
    "completion length (tokens)": "monitor/length_tokens",
    "prompts without a signal": "frac_reward_zero_std",
    "repetition": "monitor/repetition",
    "KL to the start": "kl",
    "gradient norm": "monitor/grad_norm",
}
AXES = dict(zip(X_AXES, ("optimizer steps", "generated tokens", "seconds"), strict=True))


@dataclass(frozen=True)
class Layout:
    """What is laid out.

    Attributes:
        group: the runs' W&B group.
        project: the W&B project.
        name: of the workspace and of the report.
        by: keys of the configuration by whose values runs are grouped.
        swept: keys that are axes of the parallel coordinates.
    """

    group: str
    project: str
    name: str
    by: list[str]
    swept: list[str]

    def workspace(self, entity: str) -> Any:
        """The `wandb_workspaces` workspace: a section for each x-axis, one to compare settings, one for health."""
        from wandb_workspaces import workspaces as ws
        from wandb_workspaces.expr import And

        curves = [
            ws.Section(name=f"Over {title}", panels=_curves(CURVES, axis), is_open=index == 0)
            for index, (axis, title) in enumerate(AXES.items())
        ]
        return ws.Workspace(
            entity=entity,
            project=self.project,
            name=self.name,
            sections=[
                ws.Section(name="Which setting won", panels=self._comparisons(), is_open=True),
                *curves,
                ws.Section(name="Health", panels=_curves(HEALTH, X_AXES[0])),
            ],
            settings=ws.WorkspaceSettings(x_axis=X_AXES[0], max_runs=100),
            runset_settings=ws.RunsetSettings(
                filters=And(ws.Metric("Group") == self.group),
                groupby=[ws.Config(key) for key in self.by],
                order=[ws.Ordering(ws.Summary(ACCURACY), ascending=False)],
            ),
        )

    def report(self, entity: str) -> Any:
        """The `wandb_workspaces` report, which shows the same runs, grouped by the same settings."""
        from wandb_workspaces.reports import v2 as wr

        def grid(panels: list[Any]) -> Any:
            runs = wr.Runset(
                name=self.name,  # without a project of its own it is that of the report
                filters=f"Metric('Group') = '{self.group}'",
                groupby=[f"config.{key}" for key in self.by],
            )
            return wr.PanelGrid(runsets=[runs], panels=panels)

        by = ", ".join(self.by) or "nothing"
        blocks = [
            wr.P(f"Runs of the group {self.group}, grouped by {by}. A line is the mean of a setting's runs."),
            wr.H2("Which setting won"),
            grid(self._comparisons()),
        ]
        for axis, title in AXES.items():
            blocks += [wr.H2(f"Over {title}"), grid(_curves(CURVES, axis))]
        blocks += [wr.H2("Health"), grid(_curves(HEALTH, X_AXES[0]))]
        title, said = self.name[:128], f"Group {self.group}."
        return wr.Report(project=self.project, entity=entity, title=title, description=said, blocks=blocks)

    def _comparisons(self) -> list[Any]:
        from wandb_workspaces.reports import v2 as wr

        column = wr.ParallelCoordinatesPlotColumn
        accuracy, retention = (wr.SummaryMetric(name) for name in (ACCURACY, RETENTION))
        axes = [column(metric=wr.Config(key), display_name=key) for key in self.swept]
        ends = [column(metric=retention, display_name="retention"), column(metric=accuracy, display_name="accuracy")]
        wide, half = wr.Layout(w=24, h=10), {"w": 12, "h": 8}
        return [
            wr.ParallelCoordinatesPlot(title="Settings and what came of them", columns=[*axes, *ends], layout=wide),
            wr.ScatterPlot(
                title="New skill against old ones", x=retention, y=accuracy, layout=wr.Layout(x=0, y=10, **half)
            ),
            wr.BarPlot(title="Accuracy after the training", metrics=[accuracy], layout=wr.Layout(x=12, y=10, **half)),
        ]


def _curves(metrics: dict[str, str], axis: str) -> list[Any]:
    from wandb_workspaces.reports import v2 as wr

    panels = []
    for index, (title, metric) in enumerate(metrics.items()):
        place = wr.Layout(x=index % 2 * 12, y=index // 2 * 8, w=12, h=8)
        panels.append(
            wr.LinePlot(
                title=title, x=axis, y=[metric], title_x=AXES[axis], groupby_aggfunc="mean",
                groupby_rangefunc="stderr", max_runs_to_show=100, layout=place,
            )
        )  # fmt: skip
    return panels


def send(layout: Layout, entity: str | None, output: str, timeout_s: float) -> list[str]:
    """Saves workspace and report, or writes them to a file where there is no account; returns what to tell the user.

    Raises:
        UserError: wandb-workspaces is missing, the server refuses, or the file cannot be written.
    """
    try:
        import wandb
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise UserError("this needs the package wandb-workspaces: pip install 'selfdistill[workspace]'.") from error
    try:
        known = within(timeout_s, lambda: wandb.login(prompt=False, verify=True))
    except (wandb.Error, TimeoutError) as error:
        written = _write(layout, entity, output)
        raise UserError(f"W&B cannot be reached or refuses the key: {error}. {written}") from None
    if not known:
        return [f"No W&B API key is set: run `wandb login`, or set WANDB_API_KEY. {_write(layout, entity, output)}"]
    try:
        owner: Any = entity or wandb.Api().default_entity
        workspace, report = layout.workspace(owner), layout.report(owner)
        workspace.save()
        report.save()
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"W&B did not take the workspace: {str(error).splitlines()[0][:200]}") from error
    return [f"workspace  {workspace.url}", f"report     {report.url}"]


def _write(layout: Layout, entity: str | None, output: str) -> str:
    named = entity or "ENTITY"
    models = {"workspace": layout.workspace(named)._to_model(), "report": layout.report(named)._to_model()}
    sent = {name: model.model_dump(mode="json", by_alias=True, exclude_none=True) for name, model in models.items()}
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(sent, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error.strerror}.") from error
    return f"What would be sent stands in {output}."
