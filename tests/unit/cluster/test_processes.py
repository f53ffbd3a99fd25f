import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import processes

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def started() -> Iterator[list[psutil.Process]]:
    found: list[psutil.Process] = []
    yield found
    for process in found:
        for one in processes.family([process]):
            one.kill()
        process.wait(60)


def spawn(tmp_path: Path, started: list[psutil.Process], command: list[str], **marks: str) -> psutil.Process:
    environment = {"PATH": os.environ["PATH"], **marks}
    process = processes.spawn(command, environment, tmp_path / "log", tmp_path)
    started.append(process)
    return process


def until(question: object, seconds: float = 60.0) -> bool:
    assert callable(question)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if question():
            return True
        time.sleep(0.02)
    return False


def test_only_the_marked_are_found_and_ended(tmp_path: Path, started: list[psutil.Process]) -> None:
    mine = spawn(tmp_path, started, SLEEP, TOMOSCALE_STACK="a1", TOMOSCALE_SERVICE="s3")
    sibling = spawn(tmp_path, started, SLEEP, TOMOSCALE_STACK="a1", TOMOSCALE_SERVICE="ray")
    other = spawn(tmp_path, started, SLEEP, TOMOSCALE_STACK="b2", TOMOSCALE_SERVICE="s3")
    plain = spawn(tmp_path, started, SLEEP)
    assert until(lambda: {p.pid for p in processes.marked("a1")} == {mine.pid, sibling.pid})
    assert [p.pid for p in processes.marked("a1", "s3")] == [mine.pid]
    assert processes.end(processes.marked("a1", "s3"), grace_s=60.0) == []
    assert not processes.alive(mine)
    assert all(processes.alive(process) for process in (sibling, other, plain))


def test_children_of_a_service_are_its_family_without_any_mark(tmp_path: Path, started: list[psutil.Process]) -> None:
    # Without a mark, as Ray's workers after they set their title, and without its parent: only the session still tells
    # where this grandchild came from.
    sleep = (
        "import os, time; open('pid.part', 'w').write(str(os.getpid())); os.rename('pid.part', 'pid'); time.sleep(600)"
    )
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}], env={{}})"
    leader = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {child!r}]); time.sleep(600)"
    process = spawn(tmp_path, started, [sys.executable, "-c", leader], TOMOSCALE_STACK="c3")
    assert until((tmp_path / "pid").exists)
    orphan = psutil.Process(int((tmp_path / "pid").read_text()))
    assert until(lambda: len(processes.family([process])) == 2)  # the child in between has ended
    assert orphan in processes.family([process])
    assert orphan not in process.children(recursive=True)
    assert orphan not in processes.marked("c3")
    assert processes.end(processes.family([process]), grace_s=60.0, first=[process]) == []
    assert not processes.alive(orphan)


def test_a_process_that_ignores_the_request_is_killed(tmp_path: Path, started: list[psutil.Process]) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(99)"
    )
    process = spawn(tmp_path, started, [sys.executable, "-c", stubborn])
    assert until(lambda: "ready" in (tmp_path / "log").read_text())
    assert processes.end([process], grace_s=0.3) == []
    assert not processes.alive(process)


def test_a_number_used_again_is_not_the_same_process() -> None:
    me = psutil.Process()
    assert processes.same(me.pid, me.create_time()) == me
    assert processes.same(me.pid, me.create_time() - 60) is None
    assert processes.same(me.pid, processes.started(me)) == me
    assert processes.same(me.pid, processes.started(me) - 60) is None
    assert processes.same(None, None) is None


def test_a_live_process_is_the_same_after_a_step_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    me = psutil.Process()
    noted, created = processes.started(me), me.create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda _self: created + 3600)  # derived from the clock
    assert processes.same(me.pid, noted) == me


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    process = psutil.Process(child.pid)
    assert until(lambda: not processes.alive(process))
    assert processes.same(child.pid, process.create_time()) is None
    child.wait()


def test_orphans_are_known_by_session_title_and_age(tmp_path: Path, started: list[psutil.Process]) -> None:
    child = "exec -a ray::IDLE sleep 600"
    leader = spawn(tmp_path, started, ["bash", "-c", f"bash -c '{child}' & bash -c 'exec sleep 600' & wait"])
    assert until(lambda: len(processes.family([leader])) == 3)
    created, noted, members = leader.create_time(), processes.started(leader), processes.family([leader])
    assert until(lambda: any(p.cmdline()[:1] == ["ray::IDLE"] for p in members))
    leader.send_signal(signal.SIGKILL)
    assert until(lambda: not processes.alive(leader))
    try:
        found = processes.orphans(leader.pid, created)
        assert [p.cmdline()[0] for p in found] == ["ray::IDLE"]  # while the leader is a zombie of this process
        leader.wait(60)
        found = processes.orphans(leader.pid, created)
        assert [p.cmdline()[0] for p in found] == ["ray::IDLE"]
        assert processes.orphans(leader.pid, created + 60) == []
        assert [p.cmdline()[0] for p in processes.orphans(leader.pid, noted)] == ["ray::IDLE"]
        assert processes.orphans(leader.pid, noted + 60) == []
    finally:
        for member in members:
            if processes.alive(member):
                member.kill()
