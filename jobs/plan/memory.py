"""The most memory that this process and its GPU held during a stretch of work."""

import contextlib
import resource
from pathlib import Path

import torch


def forget_peaks(device: torch.device) -> None:
    """Begin a stretch."""
    # Where this is no Linux, or not allowed, the peak is that of the whole life of the process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_resident_bytes() -> int:
    """Of this process, with all of its libraries."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gpu_bytes(device: torch.device) -> int | None:
    """Held by torch's allocator; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
