"""The most memory that a stretch of work held."""

import contextlib
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def reset_peak(device: torch.device) -> None:
    """Start a new stretch: on CUDA for torch's allocator; on CPU for the process, where the kernel can (Linux)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """MiB: allocated by torch on CUDA; resident size of the whole process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found is not None:
            return int(found[1]) / 1024
    # Kilobytes on Linux, bytes on macOS; of the whole life of the process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call held beyond what was there before, by torch's own allocator.

    On a CPU from the profiler's record of every allocation, which sees what resident size is too coarse for.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    held = most = 0
    results = record.profiler.kineto_results if record.profiler is not None else None
    events = [] if results is None else [e for e in results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
