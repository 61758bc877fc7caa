"""Peak memory of this process and of its GPU, and the memory of the machine."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

_GIB = 1024**3
# Of vLLM's build for a CPU: the variable that says how many GiB it reserves for keys and values, and what we set.
CACHE_ON_CPU, CACHE_ON_CPU_GIB = "VLLM_CPU_KVCACHE_SPACE", "1"


def reset_peak_memory() -> None:
    """Start measuring anew, because the jobs of one sweep share a process. Without /proc the old peak stays."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if cuda := _cuda_in_use():
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)


def peak_memory_gib() -> dict[str, float]:
    """Peaks in GiB: `rss`, what the process had in memory; `cuda`, where CUDA is used, what was allocated on one GPU.

    Memory of other processes, such as a vLLM server, is not counted.
    """
    peak = {"rss": round(_peak_rss_bytes() / _GIB, 3)}
    if cuda := _cuda_in_use():
        peak["cuda"] = round(max(map(cuda.max_memory_allocated, range(cuda.device_count()))) / _GIB, 3)
    return peak


def _cuda_in_use() -> ModuleType | None:
    """`torch.cuda` where this process has used a GPU. torch is not imported to find out, for that takes seconds."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _peak_rss_bytes() -> int:
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_memory_gib(gpu: bool) -> float | None:
    """What the first GPU has, or this machine has for the processes of its control group; None where nobody says."""
    if gpu:
        import torch

        return torch.cuda.get_device_properties(0).total_memory / _GIB if torch.cuda.is_available() else None
    amounts = []
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max": no limit
            amounts.append(int(Path(file).read_text()))
    with suppress(AttributeError, ValueError, OSError):  # not on Windows
        amounts.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(amounts, default=0) / _GIB or None
