"""Processes and ports of the local stack: start them marked, find exactly those again, end exactly those.

Every process is started with two environment variables, `TOMOSCALE_STACK` (the id of the state directory) and
`TOMOSCALE_SERVICE`. Children inherit them, so that even a program that was killed between starting a server and writing
down its number leaves a trail.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

STACK_MARK = "TOMOSCALE_STACK"
SERVICE_MARK = "TOMOSCALE_SERVICE"
_PORT_RANGE = range(20000, 32000)  # below the ephemeral range, so that an outgoing connection cannot take a port first


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path) -> psutil.Process:
    """Start a server in its own session with its output appended to `log`; it outlives this process."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=cwd,
            start_new_session=True,
        )
    return psutil.Process(child.pid)


def same(pid: int | None, created: float | None) -> psutil.Process | None:
    """The process with this number, if it is still the one that was started then."""
    if pid is None or created is None:
        return None
    try:
        process = psutil.Process(pid)
        # Process numbers are used again; the start time is the other half of the name.
        if abs(process.create_time() - created) < 1.0 and alive(process):
            return process
    except psutil.Error:
        pass
    return None


def alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie that nobody collected does not count."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def marked(stack: str, service: str | None = None) -> list[psutil.Process]:
    """Own processes that carry the mark of this stack (and service), this process excepted."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if environment.get(STACK_MARK) == stack and service in (None, environment.get(SERVICE_MARK)):
            found.append(process)
    return [process for process in found if alive(process)]


def family(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """`roots`, all their descendants and the members of the sessions that they lead.

    Ray's workers overwrite their environment block when they set their title, so the mark alone does not find them.
    """
    found: dict[int, psutil.Process] = {}
    sessions = set()
    for root in roots:
        found[root.pid] = root
        sessions.add(root.pid)
        with contextlib.suppress(psutil.Error):
            found.update({child.pid: child for child in root.children(recursive=True)})
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) in sessions and pid not in found:
                found[pid] = psutil.Process(pid)
    found.pop(os.getpid(), None)
    return [process for process in found.values() if alive(process)]


def orphans(leader: int, created: float) -> list[psutil.Process]:
    """Ray processes of a session whose leader died: they have lost both their parent and their mark.

    Args:
        leader: Number of the dead leader, which Linux does not use again while its session has members.
        created: When the leader was started.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        other = psutil.Process(leader)  # a zombie of ours is as good as gone
        if abs(other.create_time() - created) >= 1.0:
            return []
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) == leader:
                process = psutil.Process(pid)
                title = " ".join(process.cmdline())
                if title.startswith(("ray::", "ray-dashboard")) and process.create_time() >= created - 1.0:
                    found.append(process)
    return [process for process in found if alive(process)]


def end(
    processes: Sequence[psutil.Process], grace_s: float, first: Sequence[psutil.Process] = ()
) -> list[psutil.Process]:
    """Ask `first` (or all) to end, wait, ask the rest, then kill; returns what still runs.

    Args:
        processes: What must be gone afterwards.
        grace_s: How long a polite request may take before SIGKILL.
        first: The leaders, which end their own children in order when they are asked.
    """
    leaders = [process for process in first if alive(process)]
    deadline = time.monotonic() + grace_s
    _signal(leaders or processes, signal.SIGTERM)
    _wait(leaders or processes, deadline)
    rest = [process for process in processes if alive(process)]
    if leaders and rest:
        _signal(rest, signal.SIGTERM)
        _wait(rest, min(deadline, time.monotonic() + 2.0))
        rest = [process for process in rest if alive(process)]
    _signal(rest, signal.SIGKILL)
    _wait(rest, time.monotonic() + 30.0)  # the kernel's work, which takes longer on a busy machine
    return [process for process in rest if alive(process)]


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


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)  # checks the start time before it sends


def _wait(processes: Iterable[psutil.Process], deadline: float) -> None:
    waiting = list(processes)
    while waiting and time.monotonic() < deadline:
        for process in waiting:
            # Collects those that are our own children; others end without our help.
            with contextlib.suppress(psutil.Error, ChildProcessError):
                process.wait(timeout=0)
        waiting = [process for process in waiting if alive(process)]
        if waiting:
            time.sleep(0.05)


def port_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_ports(count: int, avoid: Iterable[int] = ()) -> list[int]:
    """`count` different ports that nothing listens on, chosen at random.

    Raises:
        OSError: there are not that many.
    """
    taken = set(avoid)
    ports: list[int] = []
    for port in random.SystemRandom().sample(_PORT_RANGE, len(_PORT_RANGE)):
        if len(ports) == count:
            break
        # Ray's metadata server listens on every interface, so a port must be free there too.
        if port not in taken and port_free(port) and port_free(port, "0.0.0.0"):
            ports.append(port)
    if len(ports) < count:
        raise OSError(f"no {count} free ports between {_PORT_RANGE.start} and {_PORT_RANGE.stop}")
    return ports


def port_owner(port: int) -> str:
    """Who listens on a port, as far as this user may see: `name (pid N)`, else an empty string."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""
