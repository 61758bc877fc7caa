import math
import sys
import time

import pytest
import wandb
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from selfdistill.config.conf import CONF
from selfdistill.errors import UserError
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.loggers import NoLogger, RunLogger, WandbLogger
from tests.runs.loggers import wandb_file

CONFIG = OmegaConf.create(
    {
        "seed": 3,
        "beta": 0.04,
        "teacher": {"name": "base", "api_key": "sk-something-secret"},
        "tags": ["a", "b"],
        "none": None,
    }
)


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def run(tmp_path):
    run = RunFolder.create(tmp_path / "outputs", "r", CONFIG)
    yield run
    run.finish("finished")


def files(run):
    return sorted(run.path.glob("wandb/offline-run-*/run-*.wandb"))


def logged(logger, run, steps, failed=False):
    logger.start(run, CONFIG)
    try:
        for step in steps:
            logger.log(step, {"reward": step / 10, "kl": math.nan, "loss": None, "kind": "text"})
            logger.log(step, {"eval/accuracy": 0.5})
        logger.table(
            "completions", [{"step": 1, "prompt": "p", "rewards": {"exact": 1.0}}, {"step": 1, "feedback": "f"}]
        )
        logger.summary({"eval": {"after": {"accuracy": 0.75}}, "status": "finished"})
    finally:
        logger.finish(failed=failed)
    (path,) = files(run)[-1:]
    return complete(path)


def complete(path):
    """The records of a finished run: W&B's own process writes the last ones after `finish` has returned."""
    for _ in range(300):
        found = wandb_file.records(path)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def test_the_offline_file_holds_the_run(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "teacher.api_key=sk-something-secret"])
    logger = WandbLogger(project="p", group="g", tags=["t"])
    found = logged(logger, run, [1, 2], failed=True)
    assert logger.location.startswith("wandb sync ")
    assert logger.location.endswith(f"{run.run_id}/wandb/offline-run-*")

    head = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (head.run_id, head.display_name, head.project, head.run_group) == (run.run_id, run.run_id, "p", "g")
    assert list(head.tags) == ["t"]
    config = wandb_file.config(found)
    assert config["seed"] == 3
    assert config["beta"] == 0.04
    assert config["teacher.name"] == "base"
    assert config["teacher.api_key"] == "***"
    assert config["tags"] == ["a", "b"]

    rows = wandb_file.history(found)
    assert [row["_step"] for row in rows] == [1, 2]
    assert [row["reward"] for row in rows] == [0.1, 0.2]
    assert all(row["eval/accuracy"] == 0.5 and "kl" not in row and "loss" not in row for row in rows)
    table = next(value for key, value in rows[-1].items() if key.startswith("completions") and "table" in str(value))
    assert table
    (stored,) = run.path.glob("wandb/offline-run-*/files/media/table/*.json")
    assert '"columns":["step","prompt","rewards.exact","feedback"]' in stored.read_text().replace(", ", ",").replace(
        ": ", ":"
    )

    assert wandb_file.summary(found)["eval.after.accuracy"] == 0.75
    assert next(record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit") == 1
    assert all(b"sk-something-secret" not in path.read_bytes() for path in run.path.rglob("*") if path.is_file())


def test_a_resumed_run_is_the_same_run(run):
    logged(WandbLogger(), run, [1, 2])
    found = logged(WandbLogger(), run, [2, 3])
    assert len(files(run)) == 2
    head = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert head.run_id == run.run_id
    assert [row["_step"] for row in wandb_file.history(found)] == [2, 3]
    assert next(record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit") == 0


def test_two_runs_of_one_process_stay_apart(tmp_path):
    first, second = (RunFolder.create(tmp_path, "r", CONFIG) for _ in range(2))
    loggers = [WandbLogger(), WandbLogger()]
    for logger, run in zip(loggers, (first, second), strict=True):
        logger.start(run, CONFIG)
    loggers[0].log(1, {"reward": 1.0})
    loggers[1].log(1, {"reward": 2.0})
    for logger in loggers:
        logger.finish()
    for run, reward in ((first, 1.0), (second, 2.0)):
        rows = wandb_file.history(complete(files(run)[0]))
        assert [row["reward"] for row in rows] == [reward]
        run.finish("finished")


@pytest.fixture
def fresh_wandb():
    """W&B reads the environment once a process."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.parametrize("key", ["0" * 40, "short"])
def test_a_key_that_cannot_be_verified_makes_the_run_go_offline(run, monkeypatch, fresh_wandb, key):
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    with pytest.warns(UserWarning, match="logged offline"):
        found = logged(WandbLogger(), run, [1])
    assert [row["reward"] for row in wandb_file.history(found)] == [0.1]


def test_a_server_that_goes_away_makes_the_run_go_offline(run, monkeypatch, fresh_wandb):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    with pytest.warns(UserWarning, match="logged offline"):
        found = logged(WandbLogger(init_timeout_s=1.0), run, [1])
    assert [row["reward"] for row in wandb_file.history(found)] == [0.1]


def test_online_without_a_key_is_refused_and_never_asks(run):
    with pytest.raises(UserError, match=r"logger\.mode is online, but no W&B API key"):
        WandbLogger(mode="online").start(run, CONFIG)
    with pytest.raises(UserError, match=r"logger\.mode is 'on'"):
        WandbLogger(mode="on")


def test_disabled_writes_nothing(run):
    logger = WandbLogger(mode="disabled")
    logger.start(run, CONFIG)
    logger.log(1, {"reward": 1.0})
    logger.finish()
    assert logger.location is None
    assert files(run) == []


def test_finish_without_start():
    WandbLogger().finish(failed=True)
    with pytest.raises(ValueError, match="not started"):
        WandbLogger().log(1, {})


@pytest.mark.parametrize("name", ["wandb", "trackio", "none"])
def test_the_shipped_configurations(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        logger = instantiate(compose(overrides=[f"+logger={name}", "+group=null", "+tags=[]", "+name=null"]).logger)
    assert isinstance(logger, RunLogger)
    assert isinstance(logger, NoLogger) == (name == "none")
