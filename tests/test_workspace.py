import json

import pytest
import wandb

from selfdistill import workspace
from tests.command import command
from tests.runs.loggers.wandb_server import WandbServer

# wandb-workspaces still uses pydantic's old names.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    wandb.teardown()
    yield
    wandb.teardown()


def panels(spec):
    return [panel for section in spec["section"]["panelBankConfig"]["sections"] for panel in section["panels"]]


def test_without_an_account_it_writes_what_it_would_send(tmp_path):
    outcome = command(["group=beta-study", "by=[experiment,beta]", "swept=[beta,alpha]"], tmp_path, workspace)
    assert outcome.code == 0, outcome.err
    assert "No W&B API key is set" in outcome.out and "outputs/workspace-beta-study.json" in outcome.out
    sent = json.loads((tmp_path / "outputs" / "workspace-beta-study.json").read_text())
    view = sent["workspace"]
    assert (view["project"], view["displayName"]) == ("selfdistill", "beta-study")
    (runs,) = view["spec"]["section"]["runSets"]
    (shown,) = runs["filters"]["filters"]
    assert (shown["key"]["name"], shown["value"]) == ("group", "beta-study")
    assert [key["name"] for key in runs["grouping"]] == ["experiment.value", "beta.value"]
    curves = [p["config"] for p in panels(view["spec"]) if p["viewType"] == "Run History Line Plot"]
    drawn = {(curve["xAxis"], curve["metrics"][0]) for curve in curves}
    metrics = "reward", "eval/accuracy", "eval/retention", "distill/divergence"
    assert drawn >= {(axis, name) for axis in ("step", "tokens/generated", "time/total_s") for name in metrics}
    (parallel,) = [p["config"] for p in panels(view["spec"]) if p["viewType"] == "Parallel Coordinates Plot"]
    axes = [column["accessor"] for column in parallel["columns"]]
    assert axes == ["config:beta.value", "config:alpha.value", "summary:after/retention", "summary:after/accuracy"]
    report = json.dumps(sent["report"])
    assert report.count("beta-study") > 3 and "Parallel Coordinates Plot" in report


def test_with_an_account_workspace_and_report_are_saved(tmp_path, monkeypatch):
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        outcome = command(["group=g", "entity=me"], tmp_path, workspace)
    assert outcome.code == 0, outcome.err
    saved = [variables for query, variables in server.queries if "upsertView" in query]
    assert [(v["entityName"], v["projectName"], v["type"]) for v in saved] == [
        ("me", "selfdistill", "project-view"), ("me", "selfdistill", "runs"),
    ]  # fmt: skip
    assert len(panels(json.loads(saved[0]["spec"]))) > 12
    assert outcome.out.count(f"{server.url}/me/selfdistill") == 2
    assert not outcome.left


def test_a_server_that_is_not_there_is_said_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    outcome = command(["group=g", "timeout_s=2"], tmp_path, workspace)
    assert outcome.code == 2
    assert "W&B cannot be reached" in outcome.err and "workspace-g.json" in outcome.err
    assert "outputs/workspace-g.json" in outcome.left


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "group"), (["group=g", "swept=[]"], "swept=[]"), (["group=g", "timeout_s=0"], "timeout_s=0")],
)
def test_what_is_missing_or_wrong_is_said(tmp_path, arguments, said):
    outcome = command(arguments, tmp_path, workspace)
    assert outcome.code == 2
    assert said in outcome.err
    assert not outcome.left
