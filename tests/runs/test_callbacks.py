import io
import json
import math
import warnings

import pytest
from omegaconf import OmegaConf
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from selfdistill.evaluation.monitors import Monitors, Threshold
from selfdistill.rollout import Rollouts
from selfdistill.runs.callbacks import (
    CompletionsCallback,
    GeneratedTokens,
    MonitorCallback,
    RecordCallback,
    use_callbacks,
)
from selfdistill.runs.folder import RunFolder
from selfdistill.runs.loggers import NoLogger
from selfdistill.runs.screen import Screen
from selfdistill.runs.step_table import StepTable


class Recorder(NoLogger):
    """A logger that remembers, and fails on request."""

    def __init__(self, fails=False):
        self.fails, self.logged, self.tables, self.caught_up = fails, [], [], []

    def catch_up(self, metrics, completions):
        self.caught_up.append(([line["step"] for line in metrics], [line["step"] for line in completions]))

    def log(self, step, metrics):
        if self.fails:
            raise ConnectionError("gone")
        self.logged.append((step, dict(metrics)))

    def table(self, name, step, rows):
        self.tables.append((name, step, list(rows)))


def recording(run, logger):
    return RecordCallback(run, logger, GeneratedTokens())


class Loop:
    """The calls that transformers' training loop makes, in its order."""

    def __init__(self, tmp_path, callbacks, max_steps=10):
        self.args = TrainingArguments(output_dir=str(tmp_path / "trainer"), report_to=[], use_cpu=True)
        self.state = TrainerState(max_steps=max_steps)
        self.control = TrainerControl()
        self.callbacks = callbacks
        self.saved = []

    def call(self, event, **kwargs):
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, self.control, **kwargs)

    def begin(self, step=0):
        self.state.global_step = step
        self.call("on_train_begin")

    def log(self, **logs):
        self.call("on_log", logs={name.replace("__", "/"): value for name, value in logs.items()})

    def step(self, **logs):
        """One step; returns whether training goes on."""
        self.control.should_save = False
        self.state.global_step += 1
        self.call("on_step_end")
        self.log(**logs)
        if self.control.should_save:
            self.saved.append(self.state.global_step)
        return not self.control.should_training_stop


@pytest.fixture
def run(tmp_path):
    run = RunFolder.create(tmp_path, "r", OmegaConf.create({}))
    yield run
    run.finish("finished")


@pytest.fixture
def console():
    return Screen(file=io.StringIO(), width=80)


def printed(console):
    return console.file.getvalue()


def test_the_record_has_one_name_for_each_metric(run, tmp_path):
    logger = Recorder()
    loop = Loop(tmp_path, [recording(run, logger)])
    loop.begin()
    loop.step(loss=0.5, entropy=0.7, step_time=0.1, reward=None, kl=math.nan)
    loop.log(eval__accuracy=0.4)
    loop.log(train_runtime=9.0, train_loss=0.5, total_flos=1.0, epoch=1.0)
    (line,) = run.metrics()
    assert line.pop("time/total_s") >= 0
    assert line == {
        "step": 1, "loss": 0.5, "reward": None, "kl": None, "tokens/generated": 0,
        "monitor/entropy": 0.7, "time/step_s": 0.1, "eval/accuracy": 0.4,
    }  # fmt: skip
    assert [step for step, _ in logger.logged] == [1, 1]
    assert logger.logged[0][1]["monitor/entropy"] == 0.7
    assert run.summary["train"] == {"train_runtime": 9.0, "train_loss": 0.5, "total_flos": 1.0}


def test_a_resume_drops_what_it_repeats_and_hands_over_the_rest(run, tmp_path):
    logger = Recorder()
    loop = Loop(tmp_path, [recording(run, logger)])
    loop.begin()
    for reward in (1.0, 2.0, 3.0):
        loop.step(reward=reward)
    loop.begin(step=1)
    assert logger.caught_up[-1] == ([1], [])  # what a kill may have kept from the logger
    loop.step(reward=20.0)
    assert [(line["step"], line["reward"]) for line in run.metrics()] == [(1, 1.0), (2, 20.0)]


def test_a_failing_logger_ends_no_training(run, tmp_path):
    loop = Loop(tmp_path, [recording(run, Recorder(fails=True))])
    loop.begin()
    with pytest.warns(UserWarning, match="The logger failed"):
        loop.step(reward=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.step(reward=2.0)
    assert len(run.metrics()) == 2


def test_completions_now_and_then_and_at_the_end(run, tmp_path, console):
    logger = Recorder()
    record = recording(run, logger)
    rows = [
        {"prompt": f"p{i // 3}", "completion": f"c{i // 2}", "reward": 1.0, "advantage": i - 1.0, "feedback": None}
        for i in range(6)
    ]
    callback = CompletionsCallback(record, console, lambda: rows, every_steps=4, keep=3, show=2)
    loop = Loop(tmp_path, [record, callback])
    loop.begin()
    loop.log(eval__accuracy=0.1)
    for _ in range(10):
        loop.step(reward=1.0)
    loop.log(eval__accuracy=0.2)
    loop.call("on_train_end")
    assert [line["step"] for line in run.completions()] == [1] * 3 + [4] * 3 + [8] * 3 + [10] * 3
    assert [(name, step) for name, step, _ in logger.tables] == [("completions", step) for step in (1, 4, 8, 10)]
    kept = [(row["prompt"], row["completion"], row["advantage"]) for row in logger.tables[0][2]]
    assert kept == [("p1", "c2", 3.0), ("p0", "c0", -1.0), ("p1", "c1", 2.0)]  # best, worst, then what differs
    assert printed(console).count("completions at step") == 4


@pytest.mark.parametrize(("interrupted", "steps"), [(False, [1, 3]), (True, [1])])
def test_the_last_completions_are_kept_where_a_budget_or_a_monitor_decides(interrupted, steps, run, tmp_path, console):
    rows = [{"prompt": "p", "completion": "c", "reward": 1.0, "advantage": 0.0}]
    record = recording(run, NoLogger())
    callback = CompletionsCallback(record, console, lambda: rows, interrupted=lambda: interrupted)
    loop = Loop(tmp_path, [record, callback], max_steps=10**9)
    loop.begin()
    for _ in range(3):
        loop.step(reward=1.0)
    loop.call("on_train_end")
    assert [line["step"] for line in run.completions()] == steps


def test_a_resumed_run_keeps_completions_when_an_unbroken_one_would(run, tmp_path, console):
    rows = [{"prompt": "p", "completion": "c", "reward": 1.0, "advantage": 0.0}]

    def loop_of(step):
        record = recording(run, NoLogger())
        loop = Loop(tmp_path, [record, CompletionsCallback(record, console, lambda: rows, every_steps=4)])
        loop.begin(step)
        return loop

    first = loop_of(0)
    for _ in range(6):
        first.step(reward=1.0)
    resumed = loop_of(5)
    for _ in range(5):
        resumed.step(reward=1.0)
    assert [line["step"] for line in run.completions()] == [1, 4, 8]


def test_generated_tokens_go_on_where_the_checkpoint_was(run, tmp_path):
    def rollouts(*lengths, demonstrated=False):
        ids = [[7] * length for length in lengths]
        return Rollouts(["p"] * len(ids), [""] * len(ids), ids, demonstrated=[demonstrated] * len(ids))

    tokens = GeneratedTokens()
    loop = Loop(tmp_path, [tokens, RecordCallback(run, NoLogger(), tokens)])
    loop.begin()
    loop.call("on_step_begin")
    tokens.add(rollouts(3, 4))
    tokens.add(rollouts(9, demonstrated=True))
    loop.step(reward=1.0)
    assert run.metrics()[-1]["tokens/generated"] == 7
    kept = tokens.state()
    loop.call("on_step_begin")
    tokens.add(rollouts(5))
    tokens.restore()  # the server was lost: a resumed run repeats the step
    assert tokens.state() == kept
    again = GeneratedTokens()
    loop.callbacks = [again]
    loop.state.stateful_callbacks = {"GeneratedTokens": kept}
    loop.begin(1)
    assert again.count == 7


def test_no_completions_no_table(run, tmp_path, console):
    record = recording(run, Recorder())
    loop = Loop(tmp_path, [record, CompletionsCallback(record, console, list)])
    loop.begin()
    loop.step(reward=1.0)
    assert printed(console) == ""


def test_a_warning_is_printed_recorded_and_lets_the_run_go_on(run, tmp_path, console):
    callback = MonitorCallback(Monitors(entropy=Threshold(below=0.1, for_steps=2)), run, console)
    loop = Loop(tmp_path, [recording(run, NoLogger()), callback])
    loop.begin()
    assert all(loop.step(entropy=0.05, reward=1.0) for _ in range(8))
    assert callback.stopped_by is None
    assert "warning at step 2: entropy: 0.05 is below 0.1 for 2 steps" in " ".join(printed(console).split())
    (alarm,) = run.summary["alarms"]
    assert (alarm["monitor"], alarm["step"], alarm["action"]) == ("entropy", 2, "warn")
    # Nothing may stop this run: no checkpoints beyond those of the user's own plan.
    assert loop.saved == []


def test_a_stop_keeps_the_best_checkpoint_by_reward(run, tmp_path, console):
    monitors = Monitors(repetition=Threshold(above=0.5, for_steps=3, action="stop"))
    callback = MonitorCallback(monitors, run, console, window=2, gap_steps=3)
    loop = Loop(tmp_path, [recording(run, NoLogger()), callback], max_steps=100)
    loop.begin()
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.4]
    assert all(loop.step(reward=reward, monitor__repetition=0.1) for reward in rewards)
    # Means over two steps are .15 .25 .35 .45 .45 .40 from step 2 on; three steps lie between two checkpoints.
    assert loop.saved == [2, 5]
    # The reward jumps because the policy repeats itself: no candidates.
    assert loop.step(reward=9.0, monitor__repetition=0.9)
    assert loop.step(reward=9.0, monitor__repetition=0.9)
    assert not loop.step(reward=9.0, monitor__repetition=0.9)
    assert loop.saved == [2, 5]
    assert (callback.best_step, loop.state.best_global_step) == (5, 5)
    assert loop.state.best_metric == pytest.approx(0.45)
    assert callback.stopped_by.monitor == "repetition"
    assert run.summary["alarms"][0]["action"] == "stop"


def test_evaluations_decide_what_is_best(run, tmp_path, console):
    monitors = Monitors(entropy=Threshold(below=0.1, action="stop"))
    callback = MonitorCallback(monitors, run, console, window=1, gap_steps=1)
    loop = Loop(tmp_path, [recording(run, NoLogger()), callback])
    loop.log(eval__accuracy=0.5)
    loop.begin()
    saved = []
    for step, accuracy in enumerate([0.4, 0.6, 0.6, 0.7], start=1):
        loop.step(reward=float(step), entropy=1.0)
        loop.log(eval__accuracy=accuracy)
        saved.append(loop.control.should_save)
    assert saved == [False, True, False, True]
    assert callback.best_step == 4


def test_a_resumed_run_alarms_as_an_unbroken_one(run, tmp_path, console):
    def callback():
        monitors = Monitors(entropy=Threshold(below_initial=0.5, for_steps=4, action="stop"))
        return MonitorCallback(monitors, run, console, window=2, gap_steps=1)

    entropies = [1.0] * 5 + [0.1] * 4
    first = callback()
    loop = Loop(tmp_path, [recording(run, NoLogger()), first])
    loop.begin()
    assert [loop.step(entropy=e, reward=float(i)) for i, e in enumerate(entropies)] == [True] * 8 + [False]
    assert first.stopped_by.step == 9

    second = callback()
    loop = Loop(tmp_path, [recording(run, NoLogger()), second])
    loop.begin(step=7)
    assert second.best_step == first.best_step == 5
    assert run.summary["alarms"] == []
    assert [loop.step(entropy=0.1, reward=1.0) for _ in range(2)] == [True, False]
    assert second.stopped_by.step == 9


def test_a_run_that_was_stopped_in_the_step_of_its_checkpoint_stays_stopped(run, tmp_path, console):
    """A kill in the final evaluation: there is no step left to take."""

    def callback():
        return MonitorCallback(Monitors(entropy=Threshold(below=0.1, for_steps=2, action="stop")), run, console)

    loop = Loop(tmp_path, [recording(run, NoLogger()), callback()])
    loop.begin()
    assert [loop.step(entropy=0.05) for _ in range(2)] == [True, False]
    again = callback()
    loop = Loop(tmp_path, [recording(run, NoLogger()), again])
    loop.begin(step=1)
    assert not loop.control.should_training_stop
    run.log_metrics(2, {"entropy": 0.05})
    loop.begin(step=2)
    assert loop.control.should_training_stop
    assert again.stopped_by.step == 2


def test_transformers_own_progress_is_replaced(tmp_path, run, console):
    from tests.tiny import tiny_model

    trainer = Trainer(model=tiny_model(), args=TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True))
    ours = [recording(run, NoLogger()), StepTable(console)]
    use_callbacks(trainer, ours)
    names = [
        type(callback).__module__.split(".")[0] + "." + type(callback).__name__
        for callback in trainer.callback_handler.callbacks
    ]
    assert "transformers.ProgressCallback" not in names
    assert "transformers.PrinterCallback" not in names
    assert trainer.callback_handler.callbacks[-2:] == ours


def test_in_a_real_training_a_stop_leaves_the_best_checkpoint_in_place(tmp_path, run, console):
    from datasets import Dataset

    from tests.tiny import tiny_model

    args = TrainingArguments(
        output_dir=str(run.path), report_to=[], use_cpu=True, max_steps=20, logging_steps=1, save_steps=2,
        save_total_limit=2, per_device_train_batch_size=1, disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": [[1, 5, 6, 2]] * 20, "labels": [[1, 5, 6, 2]] * 20})
    monitors = Monitors(length=Threshold(above=7.5, for_steps=2, action="stop"))
    callback = MonitorCallback(monitors, run, console, window=1, gap_steps=1)

    class Rewarded(Trainer):
        def log(self, logs, start_time=None):
            step = self.state.global_step
            reward = {1: 0.1, 2: 0.2, 3: 0.5}.get(step, 0.3)
            super().log({**logs, "reward": reward, "monitor/length_tokens": float(step)}, start_time)

    trainer = Rewarded(model=tiny_model(), args=args, train_dataset=data)
    use_callbacks(trainer, [recording(run, NoLogger()), callback])
    trainer.train()
    assert trainer.state.global_step == 9
    assert callback.stopped_by.monitor == "length"
    assert trainer.state.best_model_checkpoint == str(run.path / "checkpoint-3")
    kept = sorted(path.name for path in run.path.glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-8"]
    assert [line["step"] for line in run.metrics()] == list(range(1, 10))
    assert "train_runtime" in json.loads((run.path / "summary.json").read_text())["train"]
