"""The local stack as it was found, and the memory of its processes."""

import dataclasses
from pathlib import Path

import psutil

from cluster import processes
from cluster import state as states
from storage.errors import StackError


@dataclasses.dataclass(frozen=True)
class ServiceInfo:
    """One server as it was found."""

    name: str
    url: str
    pid: int | None
    healthy: bool
    detail: str  # why it is not healthy
    healthy_s: float | None  # seconds that its start took
    resident_mb: float  # of all its processes; shared pages count once where the system can tell


@dataclasses.dataclass(frozen=True)
class StackInfo:
    """The stack as it was found."""

    state_dir: Path
    services: tuple[ServiceInfo, ...]
    cpus: int

    @property
    def running(self) -> bool:
        """Whether anything runs."""
        return any(service.pid for service in self.services)

    @property
    def healthy(self) -> bool:
        """Whether everything runs and answers."""
        return bool(self.services) and all(service.healthy for service in self.services)

    def url(self, name: str) -> str:
        """The address of a service: `s3`, `mlflow` or `ray`.

        Raises:
            StackError: it was not started.
        """
        for service in self.services:
            if service.name == name:
                return service.url
        raise absent(self.state_dir)

    @property
    def jobs_address(self) -> str:
        """What `ray job submit --address` takes from any shell: Ray asks `cluster` for the token of this stack."""
        return self.url("ray").replace("http://", "cluster://")

    def to_json(self) -> dict[str, object]:
        """Plain values, without secrets."""
        return {
            "state_dir": str(self.state_dir),
            "running": self.running,
            "healthy": self.healthy,
            "cpus": self.cpus,
            "services": [dataclasses.asdict(service) for service in self.services],
            "jobs_address": self.jobs_address if self.running else "",
        }


def absent(state_dir: Path) -> StackError:
    """What to raise where no stack was started."""
    return StackError(
        f"local stack in {state_dir}",
        expected="it to run",
        found="nothing started there",
        remedy="run `tomoscale up`",
    )


def stack_mb(state_dir: Path) -> float:
    """Of all processes of a stack in megabytes, without asking any of them whether it is well.

    Raises:
        StackError: the state cannot be read.
    """
    state = states.load(state_dir)
    services = state.services.values() if state else ()
    return sum(family_mb(processes.same(service.pid, service.created)) for service in services)


def family_mb(main: psutil.Process | None) -> float:
    """Of a process and its children in megabytes; 0 where it has ended."""
    return sum(_resident_mb(process) for process in (processes.family([main]) if main else []))


def _resident_mb(process: psutil.Process) -> float:
    """Memory in megabytes: the proportional share where the kernel tells it, else the resident size."""
    try:
        try:
            full = process.memory_full_info()
            return float(getattr(full, "pss", full.rss)) / 1e6
        except psutil.AccessDenied:
            return float(process.memory_info().rss) / 1e6
    except psutil.Error:
        return 0.0
