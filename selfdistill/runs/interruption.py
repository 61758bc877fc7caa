"""Stopping in good order: Ctrl-C, SIGTERM, SIGHUP, which comes when a terminal is closed, and a scheduler's signals."""

import os
import signal
import threading
from contextlib import ExitStack
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selfdistill.training.metrics import greatest_of_all_processes

SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)


class Interruption(TrainerCallback):
    """Stops in good order on SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1, SIGUSR2: a context manager and a callback.

    While the trainer trains, the first signal lets it end its step, save a checkpoint and stop. Outside of the training
    there is nothing to save and the first signal raises KeyboardInterrupt. A second Ctrl-C raises KeyboardInterrupt at
    once, a third ends the process; further signals of the other kinds change nothing. Handlers that were there before
    are put back. SIGUSR1 and SIGUSR2 are what schedulers send before they take a machine away: a handler that was there
    before, such as submitit's, which queues the job again, is called once the run is saved and closed.

    Where several processes train, one signalled process stops them all at the same step.

    Args:
        notice: whether to print what the signal leads to.
    """

    def __init__(self, *, notice: bool = True) -> None:
        self.notice = notice
        self._number = 0  # of the signal that has come
        self._training = self._stopping = False
        self._interrupts = 0
        self._terminals: list[int] = []
        self._of_scheduler: list[int] = []  # signals to pass on at the end
        self._restore_handlers = ExitStack()

    @property
    def requested(self) -> bool:
        """Whether a signal has come, to this process or, as soon as they have agreed on it, to another one."""
        return self._number > 0

    @property
    def exit_code(self) -> int:
        """What an interrupted process should end with: 128 and the signal's number."""
        return 128 + (self._number or signal.SIGINT)

    def __enter__(self) -> "Interruption":  # noqa: PYI034 - beartype, which checks types in the tests, refuses Self here
        # Python delivers signals to the main thread, and lets only that one set handlers.
        if threading.current_thread() is threading.main_thread():
            self._terminals = [number for number in (1, 2) if os.isatty(number)]
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *SCHEDULERS):
                if signal.getsignal(number) == signal.SIG_IGN and number == signal.SIGHUP:
                    continue  # nohup
                self._restore_handlers.callback(signal.signal, number, signal.signal(number, self._handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_handlers.close()
        for number in self._of_scheduler:
            if callable(signal.getsignal(number)):
                signal.raise_signal(number)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._number = greatest_of_all_processes(self._number, args)
        if self.requested:
            self._stopping = control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._training = False
        self._number = greatest_of_all_processes(self._number, args)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:  # the terminal is gone, and what is printed to it would raise an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(nowhere, terminal)
            os.close(nowhere)
        if number in SCHEDULERS and number not in self._of_scheduler:
            self._of_scheduler.append(number)
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 2:
            os._exit(130)
        if self._stopping and self._interrupts < 2:
            return  # the checkpoint is being saved; a launcher passes on a signal that has come already
        first = not self.requested
        self._number = self._number or number
        if not self._training or (self._interrupts > 1 and number == signal.SIGINT):
            raise KeyboardInterrupt
        if first and self.notice:
            name = signal.Signals(number).name
            message = f"{name}: saving a checkpoint after this step, then stopping. Ctrl-C again to stop at once.\n"
            # A signal may come in the middle of a print; os.write is safe there, the console is not.
            os.write(2, message.encode())
