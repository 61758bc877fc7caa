import math
import os
import subprocess
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
from selfdistill.runs.loggers.wandb_file import steps
from tests.runs.loggers import wandb_records
from tests.runs.loggers.wandb_server import WandbServer

CONFIG = OmegaConf.create(
    {
        "seed": 3,
        "beta": 0.04,
        "teacher": {
            "name": "base",
            "api_key": "sk-something-secret",
            "base_url": "http://me:open-sesame@teacher:8000/v1",
        },
        "tags": ["a", "b"],
        "none": None,
    }
)

SECRETS = ["teacher.api_key=sk-something-secret", "teacher.base_url=http://me:open-sesame@teacher:8000/v1"]


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
        logger.table("completions", steps[-1], [{"prompt": "p", "rewards": {"exact": 1.0}}, {"feedback": "f"}])
        logger.files("report", [run.path / "config.yaml"])
        logger.summary({"after": {"accuracy": 0.75}, "status": "finished"})
    finally:
        logger.finish(failed=failed)
    (path,) = files(run)[-1:]
    return wandb_records.complete(path)


def head(path):
    return next(record.run for record in wandb_records.records(path) if record.WhichOneof("record_type") == "run")


def test_the_offline_file_holds_the_run(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", *SECRETS])
    logger = WandbLogger(project="p", group="g", tags=["t"])
    found = logged(logger, run, [1, 2], failed=True)
    assert logger.location.startswith("wandb sync ")
    assert logger.location.endswith(f"{run.run_id}/wandb/offline-run-*")

    run_record = head(found)
    assert (run_record.run_id, run_record.display_name) == (run.run_id, run.run_id)
    assert (run_record.project, run_record.run_group) == ("p", "g")
    assert list(run_record.tags) == ["t"]
    config = wandb_records.config(found)
    assert config["seed"] == 3
    assert config["beta"] == 0.04
    assert config["teacher.name"] == "base"
    assert config["teacher.api_key"] == "***"
    assert config["teacher.base_url"] == "http://***@teacher:8000/v1"
    assert config["tags"] == ["a", "b"]

    rows = wandb_records.history(found)
    assert [(row["_step"], row["step"]) for row in rows] == [(1, 1), (2, 2)]
    assert [row["reward"] for row in rows] == [0.1, 0.2]
    assert all(row["eval/accuracy"] == 0.5 and "kl" not in row and "loss" not in row for row in rows)
    table = next(value for key, value in rows[-1].items() if key.startswith("completions") and "table" in str(value))
    assert table
    (stored,) = run.path.glob("wandb/offline-run-*/files/media/table/*.json")
    columns = stored.read_text().replace(", ", ",").replace(": ", ":")
    assert '"columns":["step","prompt","rewards.exact","feedback"]' in columns

    assert wandb_records.summary(found)["after/accuracy"] == 0.75
    defined = wandb_records.metrics(found)
    assert defined.keys() >= {"step", "tokens/generated", "time/total_s"}  # what curves can be drawn over
    assert defined["*"] == ("step", set())
    assert defined["eval/accuracy"] == ("step", {"max", "last"})
    assert defined["eval/forgetting"] == ("step", {"min", "last"})
    artifacts = [r.artifact for r in wandb_records.records(found) if r.WhichOneof("record_type") == "artifact"]
    (report,) = [artifact for artifact in artifacts if artifact.type == "report"]
    assert [item.path for item in report.manifest.contents] == ["config.yaml"]
    assert wandb_records.exits(found)[0].exit_code == 1
    written = [path.read_bytes() for path in run.path.rglob("*") if path.is_file()]
    assert written
    for secret in (b"sk-something-secret", b"open-sesame"):
        assert not any(secret in content for content in written)


def test_a_resumed_run_is_the_same_run_and_each_step_is_in_it_once(run):
    """As after a kill: the second step was not written any more, the first one comes again."""
    (run.path / "log.txt").write_text("what was on the screen")
    first = logged(WandbLogger(), run, [1])
    logger = WandbLogger()
    logger.start(run, CONFIG)
    logger.catch_up(
        [{"step": 1, "reward": 9.0}, {"step": 2, "reward": 0.2, "kl": None}],
        [{"step": 1, "prompt": "p"}, {"step": 2, "prompt": "p", "completion": "c"}],
    )
    for step in (1, 2, 3):
        logger.log(step, {"reward": step / 10})
        logger.table("other", step, [{"prompt": "p"}])
    logger.finish()
    assert len(files(run)) == 2
    second = wandb_records.complete(files(run)[-1])
    assert head(second).run_id == head(first).run_id == run.run_id
    rows = {row["_step"]: row for path in files(run) for row in wandb_records.history(path)}
    assert [row["_step"] for row in wandb_records.history(second)] == [2, 3]
    assert {step: row["reward"] for step, row in rows.items()} == {1: 0.1, 2: 0.2, 3: 0.3}
    assert any(name.startswith("completions") for name in rows[2])
    assert wandb_records.exits(second)[0].exit_code == 0
    logs = list(second.parent.glob("files/output.log"))
    assert [path.read_text() for path in logs] == ["what was on the screen"]


def test_a_torn_file_is_read_up_to_the_tear(run):
    path = logged(WandbLogger(), run, [1, 2, 3])
    whole, content = wandb_records.history(path), path.read_bytes()
    found = set()
    for end in range(0, len(content), 37):
        path.write_bytes(content[:end])
        rows = wandb_records.history(path)
        assert rows == whole[: len(rows)]
        found.add(len(rows))
    assert found == {0, 1, 2, 3}
    path.write_bytes(content[:7])  # what a kill left before the file was flushed as the run went on
    assert steps(run.path / "wandb") == frozenset()


KILLED = """
import os, sys
from pathlib import Path
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.loggers import WandbLogger
from selfdistill.runs.loggers.wandb_file import steps
run = RunFolder.open(Path(sys.argv[1]))
logger = WandbLogger(mode="offline", flush_every_s=0.1)
logger.start(run, run.config)
for step in range(4):
    logger.log(step, {"reward": 1.0})
while len(steps(run.path / "wandb")) < 3:
    pass
os.kill(os.getpid(), 9)
"""


@pytest.mark.long
def test_what_was_logged_outlives_a_kill(tmp_path):
    made = RunFolder.create(tmp_path / "outputs", "r", CONFIG)
    made.finish("finished")
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(made.path)], env=environment, timeout=60, check=False)
    assert done.returncode == -9
    assert steps(made.path / "wandb") >= {0, 1, 2}


def labelled(run, choices, mode="RUN", dirname=""):
    (run.path / ".hydra").mkdir()
    known = {"hydra": {"mode": mode, "runtime": {"choices": choices}, "job": {"override_dirname": dirname}}}
    OmegaConf.save(OmegaConf.create(known), run.path / ".hydra" / "hydra.yaml")


def test_the_choices_are_fields_and_tags_and_a_job_is_named_by_what_was_swept(run):
    choices = {"experiment": "sdpo", "model": "tiny", "data": "near", "reward": "exact_match", "teacher": "none"}
    labelled(run, choices, "MULTIRUN", "alpha=0.5 beta=0.04 seed=1")
    path = logged(WandbLogger(tags=["mine"]), run, [1])
    assert head(path).display_name == "sdpo alpha=0.5 beta=0.04 seed=1"
    assert head(path).job_type == "sdpo"
    assert list(head(path).tags) == ["mine", "experiment=sdpo", "model=tiny", "data=near", "reward=exact_match"]
    config = wandb_records.config(path)
    assert {name: config[name] for name in choices} == {**choices, "teacher": None}


def test_a_folder_that_cannot_be_written_is_an_error_of_the_system(run):
    """The record of a run takes it as no reason to end the run."""
    (run.path / "wandb").write_text("no folder")
    with pytest.raises(OSError, match="wandb"):
        WandbLogger().start(run, CONFIG)


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
        rows = wandb_records.history(wandb_records.complete(files(run)[0]))
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
    assert [row["reward"] for row in wandb_records.history(found)] == [0.1]


def test_a_server_that_goes_away_makes_the_run_go_offline(run, monkeypatch, fresh_wandb):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    with pytest.warns(UserWarning, match="logged offline"):
        found = logged(WandbLogger(init_timeout_s=1.0), run, [1])
    assert [row["reward"] for row in wandb_records.history(found)] == [0.1]


@pytest.mark.long
@pytest.mark.parametrize("drips_from", ["viewer", "RunResumeStatus", "never"])
def test_a_server_that_drips_holds_up_neither_start_nor_end(run, monkeypatch, fresh_wandb, drips_from):
    with WandbServer(drips_from=drips_from) as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        logger = WandbLogger(init_timeout_s=3.0, finish_timeout_s=3.0)
        if drips_from == "never":
            logger.start(run, CONFIG)
            assert logger.location.startswith(server.url)
            server.drip()
        else:
            with pytest.warns(UserWarning, match="logged offline"):
                logger.start(run, CONFIG)
            assert logger.location.startswith("wandb sync")
        assert server.seconds_open < 15  # three for the start, and what W&B's own processes take
        logger.log(1, {"reward": 0.1})
        began = time.monotonic()
        logger.finish()
        wandb.teardown()
        assert time.monotonic() - began < 15
    assert steps(run.path / "wandb") == {1}


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
