"""Processes of the local stack: start them marked, find exactly those again, end exactly those.

By hand, because supervisors of processes want a program of their own that runs all the time, and start what ends.

Every process is started with two environment variables, `TOMOSCALE_STACK` (the id of the state directory) and
`TOMOSCALE_SERVICE`. Children inherit them, so that even a program that was killed between starting a server and writing
down its number leaves a trail.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

STACK_MARK = "TOMOSCALE_STACK"
SERVICE_MARK = "TOMOSCALE_SERVICE"
_START_FIELD = 19  # of /proc/PID/stat, behind the name
_EPOCH = 1e9  # seconds: no machine is on for so long, and no clock shows less


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


def started(process: psutil.Process) -> float:
    """When it started: in seconds since the machine did, or since the epoch where the system does not tell.

    What psutil calls the creation time moves with every step of the machine's clock, and a live process would then be
    taken for another one.
    """
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float(process.create_time())
    return int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")


def same(pid: int | None, start: float | None) -> psutil.Process | None:
    """The process with this number, if it is still the one that `started` then.

    Earlier versions noted psutil's creation time; that is understood too.
    """
    if pid is None or start is None:
        return None
    try:
        process = psutil.Process(pid)
        # Process numbers are used again; the start time is the other half of the name.
        if abs(_later_s(process, start)) < 1.0 and alive(process):
            return process
    except psutil.Error:
        pass
    return None


def _later_s(process: psutil.Process, start: float) -> float:
    """How much later than `start` it started, by the clock that this was noted by."""
    return (process.create_time() if start > _EPOCH else started(process)) - start


def alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie that nobody collected does not count."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def marked(stack: str, service: str | None = None) -> list[psutil.Process]:
    """Own processes that carry the mark of this stack (and service), this process excepted."""
    members = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if environment.get(STACK_MARK) == stack and service in (None, environment.get(SERVICE_MARK)):
            members.append(process)
    return [process for process in members if alive(process)]


def family(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """`roots`, all their descendants and the members of the sessions that they lead.

    Ray's workers overwrite their environment block when they set their title, so the mark alone does not find them.
    """
    members: dict[int, psutil.Process] = {}
    sessions = set()
    for root in roots:
        members[root.pid] = root
        sessions.add(root.pid)
        with contextlib.suppress(psutil.Error):
            members.update({child.pid: child for child in root.children(recursive=True)})
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) in sessions and pid not in members:
                members[pid] = psutil.Process(pid)
    members.pop(os.getpid(), None)
    return [process for process in members.values() if alive(process)]


def orphans(leader: int, start: float) -> list[psutil.Process]:
    """Ray processes of a session whose leader died: they have lost both their parent and their mark.

    Args:
        leader: Number of the dead leader, which Linux does not use again while its session has members.
        start: When the leader `started`.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        other = psutil.Process(leader)  # a zombie of ours is as good as gone
        if abs(_later_s(other, start)) >= 1.0:
            return []
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) == leader:
                process = psutil.Process(pid)
                title = " ".join(process.cmdline())
                if title.startswith(("ray::", "ray-dashboard")) and _later_s(process, start) >= -1.0:
                    members.append(process)
    return [process for process in members if alive(process)]


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
