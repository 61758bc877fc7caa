import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from selfdistill.runs.interruption import Interruption

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True), TrainerState(), TrainerControl()


def press(number):
    os.kill(os.getpid(), number)
    # Python runs handlers between two of its own instructions.
    for _ in range(3):
        threading.Event().wait(0.001)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_saves_and_stops_after_the_step(arguments, number, capfd):
    args, state, control = arguments
    with Interruption() as interruption:
        interruption.on_train_begin(args, state, control)
        interruption.on_step_end(args, state, control)
        assert not interruption.requested
        assert not control.should_training_stop
        press(number)
        assert interruption.requested
        assert not control.should_training_stop
        interruption.on_step_end(args, state, control)
        assert control.should_save
        assert control.should_training_stop
    assert "saving a checkpoint after this step" in capfd.readouterr().err


def test_the_second_ctrl_c_raises_at_once(arguments):
    with Interruption() as interruption:
        interruption.on_train_begin(*arguments)
        press(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            press(signal.SIGINT)


def test_more_sigterms_change_nothing(arguments):
    with Interruption() as interruption:
        interruption.on_train_begin(*arguments)
        for _ in range(4):
            press(signal.SIGTERM)
        assert interruption.requested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_of_the_training_the_first_signal_raises(arguments, number):
    with Interruption() as interruption:
        with pytest.raises(KeyboardInterrupt):
            press(number)
        interruption.on_train_begin(*arguments)
        interruption.on_train_end(*arguments)
        with pytest.raises(KeyboardInterrupt):
            press(number)
        assert interruption.requested


def test_a_closed_terminal_is_not_printed_to(arguments):
    """Whoever prints to a terminal that is gone gets an error, in the middle of the last step."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException), Interruption() as interruption:
            interruption.on_train_begin(*arguments)
            os.write(1, b"ready")
            deadline = time.monotonic() + 20
            while not interruption.requested and time.monotonic() < deadline:
                time.sleep(0.01)
            os.write(1, b"a step")
            os.write(2, b"an alarm")
            code = interruption.exit_code
        os._exit(code)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)  # the kernel sends SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129


def test_nohup_is_left_alone():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            press(signal.SIGHUP)
            assert not interruption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), Interruption():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        raise RuntimeError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_in_another_thread_nothing_is_set_up():
    problems = []

    def work():
        try:
            with Interruption() as interruption:
                problems.append(interruption.requested)
        except Exception as error:  # noqa: BLE001 - the thread's failure is the test's
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert problems == [False]


@pytest.mark.long
def test_sigterm_in_a_real_training_leaves_a_checkpoint_to_go_on_from(tmp_path):
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}]
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from selfdistill.runs.callbacks import use_callbacks
from selfdistill.runs.interruption import Interruption
from tests.tiny import tiny_model

class Signalled(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

data = Dataset.from_dict({{"input_ids": [[1, 5, 6, 2]] * 20, "labels": [[1, 5, 6, 2]] * 20}})
args = TrainingArguments(output_dir={str(tmp_path)!r}, report_to=[], use_cpu=True, max_steps=10, save_strategy="no",
    per_device_train_batch_size=1, disable_tqdm=True)
with Interruption() as interruption:
    trainer = Trainer(model=tiny_model(), args=args, train_dataset=data)
    use_callbacks(trainer, [Signalled(), interruption])
    trainer.train()
print(interruption.requested, trainer.state.global_step)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True 4"
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()
