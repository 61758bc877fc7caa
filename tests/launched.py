"""Programs in several processes, started as `torchrun` starts them, without importing everything anew for each.

A process that has imported the program (`python -m tests.launched`) forks for every launch; in the fork runs torchrun's
own command, whose workers are forked too instead of being executed. Whatever a launch prints goes to a file.
"""

import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAM = "selfdistill.train"
LIMIT_S = 200
# "STEP RANK STATEMENT": what this process does when it is to generate at this step.
INCIDENT = "INCIDENT"


@dataclass(frozen=True)
class Launch:
    """`code` is the launcher's exit code, `pids` those of the processes that it started."""

    code: int
    terminal: str
    pids: list[int]


class Launcher:
    """The preloaded process, seen from the tests."""

    def __init__(self) -> None:
        # An earlier test's W&B names its service in the environment, and that service is not this one's.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_SERVICE")}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.launched"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __call__(
        self,
        arguments: Sequence[str],
        folder: Path,
        processes: int = 2,
        incident: str = "",
        environment: Mapping[str, str] | None = None,
        program: str = PROGRAM,
    ) -> Launch:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        folder.mkdir(exist_ok=True)
        request = {
            "arguments": list(arguments), "folder": str(folder), "processes": processes, "incident": incident,
            "environment": dict(environment or {}), "program": program,
        }  # fmt: skip
        print(json.dumps(request), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        pids = [int(file.name.removeprefix("pid-")) for file in folder.glob("pid-*")]
        return Launch(code, (folder / "terminal.txt").read_text(), pids)

    def close(self) -> None:
        self.process.communicate()


class Fork:
    """As much of `subprocess.Popen` as torchrun uses, for a function instead of a command."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_exit_code(work))

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.02)
        return code


def _exit_code(work: Callable[[], None]) -> int:
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve() -> None:
    """Answers each request on standard input with the exit code of its launch."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in ("selfdistill.runs.session", "wandb", "torch.distributed.run", PROGRAM):
        importlib.import_module(name)
    del sys.modules[PROGRAM]  # it is run anew
    for line in sys.stdin:
        request = json.loads(line)
        launch = Fork(partial(_launch, **request))
        try:
            code = launch.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = -1
            for file in Path(request["folder"]).glob("pid-*"):
                os.kill(int(file.name.removeprefix("pid-")), signal.SIGKILL)
            os.kill(launch.pid, signal.SIGKILL)
        print(code, file=answers, flush=True)


def _launch(
    arguments: list[str], folder: str, processes: int, incident: str, environment: Mapping[str, str], program: str
) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    terminal = os.open(Path(folder) / "terminal.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    os.chdir(folder)
    for file in Path().glob("pid-*"):
        file.unlink()
    os.environ[INCIDENT] = incident
    os.environ.update(environment)
    command = ["-m", program, *arguments]
    if processes == 1:
        _work(command, {})
        return

    def popen(handler: SubprocessHandler, args: Sequence[str], env: Mapping[str, str]) -> Fork:
        return Fork(lambda: _work(args[args.index("-m") :], env))

    SubprocessHandler._popen = popen  # type: ignore[method-assign,assignment]
    run.main(["--nproc-per-node", str(processes), "--master-port", str(_free_port()), *command])


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(command: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    if environment:
        os.setsid()  # so does torchrun
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    Path(f"pid-{os.getpid()}").touch()
    _same_draws_in_any_process()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and "FSDP_AS_IT_IS" not in os.environ:
        _fsdp_on_a_cpu()
    program = command[1]
    sys.argv = [program, *command[2:]]
    with _counted_passes() if "COUNT_PASSES" in os.environ else nullcontext():
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _same_draws_in_any_process() -> None:
    """Ties the random numbers of a completion to its place in the whole batch, whichever process has it."""
    import torch

    from selfdistill.training.trainer import SelfDistillTrainer

    generate = SelfDistillTrainer._generate_single_turn
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    draws = random.Random()

    def counted(trainer: SelfDistillTrainer, *args: Any, **kwargs: Any) -> Any:
        step, of_rank, statement = (os.environ[INCIDENT] or "-1 -1 pass").split(" ", 2)
        if trainer.state.global_step == int(step) and rank == int(of_rank):
            exec(statement)
        draws.seed(trainer.state.global_step)
        return generate(trainer, *args, **kwargs)

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        rows, generator = len(probabilities), torch.Generator().manual_seed(draws.getrandbits(32))
        drawn = torch.rand(rows * count, generator=generator)[rank * rows : (rank + 1) * rows]
        return (probabilities.cumsum(dim=-1) < drawn[:, None]).sum(dim=-1, keepdim=True)

    SelfDistillTrainer._generate_single_turn = counted  # type: ignore[method-assign]
    torch.multinomial = multinomial  # type: ignore[assignment]


@contextmanager
def _counted_passes() -> Iterator[None]:
    """Leaves the number of passes that this process made through language models in a file of its own."""
    from torch.nn.modules.module import register_module_forward_pre_hook
    from transformers import GenerationMixin

    passes = 0

    def count(module: object, _: object) -> None:
        nonlocal passes
        passes += isinstance(module, GenerationMixin)

    with register_module_forward_pre_hook(count):
        yield
    Path(f"passes-{os.environ['RANK']}").write_text(str(passes))


def _fsdp_on_a_cpu() -> None:
    """Lets accelerate use FSDP on a CPU, where torch has it and accelerate knows data parallelism alone."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    initialise = AcceleratorState.__init__

    def sharding(state: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        initialise(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and state.distributed_type != DistributedType.FSDP:
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = sharding  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
