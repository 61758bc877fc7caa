"""The resident memory of this process, for benchmarks that compare peaks. Linux only."""

from pathlib import Path


def reset_peak() -> None:
    """From here on `resident_mb("VmHWM")` is the peak since this call; an OSError where that cannot be had."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mb(field: str) -> float:
    """VmRSS, resident memory now, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")
