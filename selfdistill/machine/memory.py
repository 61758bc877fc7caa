"""Peak memory of this process and of its GPU."""

import re
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

_GIB = 1024**3


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
