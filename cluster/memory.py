"""Memory of the local stack's processes."""

from pathlib import Path

import psutil

from cluster import processes
from cluster import state as states


def of_stack(state_dir: Path) -> float:
    """Of all processes of a stack in megabytes, without asking any of them whether it is well.

    Raises:
        StackError: the state cannot be read.
    """
    state = states.load(state_dir)
    services = state.services.values() if state else ()
    return sum(of_family(processes.same(service.pid, service.created)) for service in services)


def of_family(main: psutil.Process | None) -> float:
    """Of a process and its children in megabytes; 0 where it has ended."""
    return sum(resident_mb(process) for process in (processes.family([main]) if main else []))


def resident_mb(process: psutil.Process) -> float:
    """Memory in megabytes: the proportional share where the kernel tells it, else the resident size."""
    try:
        try:
            full = process.memory_full_info()
            return float(getattr(full, "pss", full.rss)) / 1e6
        except psutil.AccessDenied:
            return float(process.memory_info().rss) / 1e6
    except psutil.Error:
        return 0.0
