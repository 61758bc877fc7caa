"""The processes that train one run together: which is the main one, and how all end when one of them does.

A process that fails cannot call the others: they wait for it in a collective operation, which gives up after half an
hour. So each process announces its early end in the store through which the processes found each other, and a thread
of every process looks there.
"""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")

POLL_S = 0.3
# A launcher kills all processes as soon as one is gone with an exit code. So they stay until the main one has written
# down why, and all but the one that failed stay a little longer, until that one has said why.
ACKNOWLEDGE_S = 10.0
SAY_S = 2.0
_runs = itertools.count()  # a sweep trains several runs in the same processes, one after another


@dataclass(frozen=True)
class EarlyEnd:
    """Why a process left the run before the run was over.

    Attributes:
        status: what becomes of the run.
        exit_code: of the processes that end because of it.
        refused: whether it is a mistake of the user, a UserError.
        traceback: for error.txt; None where there is nothing to explain.
        process: index of the process that left.
    """

    status: Literal["failed", "interrupted"]
    exit_code: int
    refused: bool = False
    traceback: str | None = None
    process: int = 0


class Processes:
    """The processes of one run, seen from one of them: a context manager that watches over the others.

    Args:
        cpu: whether the training is on the CPU; the process group is made for that device.
        backend: of torch.distributed; None takes the device's usual one.
        timeout_s: after which a collective operation gives up.

    Attributes:
        on_early_end: called, in a thread, before this process ends because another one did.
    """

    def __init__(self, *, cpu: bool, backend: str | None = None, timeout_s: int = 1800) -> None:
        state = PartialState(cpu=cpu, backend=backend, timeout=timedelta(seconds=timeout_s))
        self.index, self.count, self.is_main = state.process_index, state.num_processes, state.is_main_process
        self.on_early_end: Callable[[EarlyEnd], None] = lambda end: None
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._wait_for_others, daemon=True)
        if self.count > 1:
            # A connection of its own: the training's may be held by an operation that waits for a process that is gone.
            store = torch.distributed.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._store = torch.distributed.PrefixStore(f"selfdistill-{next(_runs)}", store)

    def __enter__(self) -> "Processes":  # noqa: PYI034 - beartype, which checks types in the tests, refuses Self here
        if self.count > 1:
            self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_watching()

    def share(self, value: T) -> T:
        """The main process's value, in every process."""
        holder = [value]
        if self.count > 1:
            broadcast_object_list(holder)
        return holder[0]

    def wait_for_all(self) -> None:
        """Returns when every process has come here, however long the main one takes.

        It may export for an hour, and a collective operation gives up before.
        """
        if self.is_main and self.count > 1:
            self._store.set("over", "")
        while self.count > 1 and not self._store.check(["over"]):
            time.sleep(POLL_S)
        PartialState().wait_for_everyone()

    def announce(self, end: EarlyEnd) -> EarlyEnd:
        """Ends the other processes; returns the end that was announced first, by this process or by another one."""
        if self.count == 1:
            return end
        self._stop_watching()
        return _read(self._store.compare_set("end", "", json.dumps(asdict(end))))

    def acknowledge(self, end: EarlyEnd) -> None:
        """Called once the end is recorded: the main process says so, and the others wait for that.

        Returns in the process that left first, or else when that one should be gone.
        """
        if self.count == 1:
            return
        if self.is_main:
            self._store.set("written", "")
        else:
            with suppress(torch.distributed.DistError):
                self._store.wait(["written"], timedelta(seconds=ACKNOWLEDGE_S))
        if end.process != self.index:
            time.sleep(SAY_S)

    def _stop_watching(self) -> None:
        self._over.set()
        if self._watch.is_alive():
            self._watch.join()

    def _wait_for_others(self) -> None:
        while not self._over.wait(POLL_S):
            try:
                if not self._store.check(["end"]):
                    continue
                end = _read(self._store.get("end"))
            except torch.distributed.DistError as error:
                end = EarlyEnd(
                    "failed", 1, traceback=f"The process through which all others found each other is gone: {error}\n"
                )
            try:
                self.on_early_end(end)
                self.acknowledge(end)
            finally:
                sys.stdout.flush()
                os._exit(end.exit_code)


def _read(announced: bytes) -> EarlyEnd:
    return EarlyEnd(**json.loads(announced))
