"""The most memory that a stretch of work held."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


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
    current = most = 0
    results = record.profiler.kineto_results if record.profiler is not None else None
    events = [] if results is None else [e for e in results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        most = max(most, current)
    return most
