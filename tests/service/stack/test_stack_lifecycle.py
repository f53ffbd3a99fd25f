"""Starting and stopping: in disorder, halfway, again."""

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import ports, processes, services, stack
from cluster import state as states
from storage.errors import StackError

pytestmark = pytest.mark.service


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tl-", dir="/tmp"))
    yield path
    stack.down(path, purge=True)
    shutil.rmtree(path, ignore_errors=True)


def state_of(folder: Path) -> states.State:
    state = states.load(folder)
    assert state is not None
    return state


def assert_gone(state: states.State, members: list[psutil.Process]) -> None:
    assert processes.marked(state.stack) == []
    assert [process for process in members if processes.alive(process)] == []
    busy = {port: ports.owner_of(port) for numbers in state.ports.values() for port in numbers.values()}
    assert {port: owner for port, owner in busy.items() if not ports.is_free(port)} == {}
    own = state.ports["s3"].values()
    assert [p for p in services.SOCKETS.glob("seaweedfs-*.sock") if int(p.stem.rsplit("-", 1)[1]) in own] == []


def kill(pid: int | None) -> None:
    """Kill, and wait for the end, which may come a while after the signal."""
    process = psutil.Process(pid)
    process.kill()
    process.wait(120)


def test_a_life(folder: Path) -> None:
    info = stack.up(folder)
    client = services.s3_client(folder, state_of(folder).services["s3"].ports["s3"])
    client.put_object(Bucket="volumes", Key="kept", Body=b"data")
    # One server dies alone: `up` starts that one, at its old address, and leaves the others alone.
    pids = {service.name: service.pid for service in info.services}
    kill(pids["s3"])
    assert "no process" in [service.detail for service in stack.status(folder).services]
    # MLflow and Ray know that address: it is not changed under them when somebody else has taken it.
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", int(info.url("s3").rsplit(":", 1)[1])))
        server.listen()
        with pytest.raises(StackError, match="MLflow and Ray know"):
            stack.up(folder)
    assert processes.alive(psutil.Process(pids["mlflow"]))
    again = stack.up(folder)
    assert {s.name: s.pid for s in again.services if s.name != "s3"} == {k: v for k, v in pids.items() if k != "s3"}
    assert again.healthy
    assert again.url("s3") == info.url("s3")
    # The leader of Ray's processes dies: what it leaves behind, without parent, belongs to us too.
    ray = stack._all(state_of(folder), "ray")
    members = [process for name in states.SERVICES for process in stack._all(state_of(folder), name)]
    assert len(ray) > 10
    kill(pids["ray"])
    said: list[str] = []
    assert stack.down(folder, progress=said.append)
    assert_gone(state_of(folder), members)
    assert not stack.status(folder).running
    assert stack.down(folder) is False
    # What was stored is there after the next start.
    third = stack.up(folder)
    assert third.healthy
    client = services.s3_client(folder, state_of(folder).services["s3"].ports["s3"])
    assert client.get_object(Bucket="volumes", Key="kept")["Body"].read() == b"data"
    members = [process for name in states.SERVICES for process in stack._all(state_of(folder), name)]
    assert stack.down(folder, purge=True, progress=said.append)
    assert "deleted" in said[-1]
    assert [process for process in members if processes.alive(process)] == []
    assert list(folder.parent.glob(folder.name)) == []


def test_a_server_that_dies_while_up_looks_at_it_is_started_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = stack.up(folder)
    s3 = psutil.Process(info.services[0].pid)
    probe = services.s3_problem

    def dying(state_dir: Path, port: int) -> str:
        monkeypatch.setattr(services, "s3_problem", probe)
        kill(s3.pid)
        return "no answer"

    monkeypatch.setattr(services, "s3_problem", dying)
    said: list[str] = []
    again = stack.up(folder, progress=said.append)
    assert again.healthy
    assert again.url("s3") == info.url("s3")
    assert [a.pid == b.pid for a, b in zip(info.services, again.services, strict=True)] == [False, True, True]
    assert any("has ended meanwhile" in line for line in said)


KILLED = """
import os, signal, sys
from pathlib import Path
from cluster import processes, stack

count, real = 0, processes.spawn
def spawn(*given):
    global count
    process = real(*given)
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)  # the server runs, and nobody has written down its number
    return process
processes.spawn = spawn
stack.up(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("nth", [1, 3])
def test_a_starter_killed_between_start_and_note_leaves_nothing_after_down(folder: Path, nth: int) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    try:
        starter = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(nth)], check=False, timeout=300)
        assert starter.returncode == -signal.SIGKILL
        state = state_of(folder)
        last = list(states.SERVICES)[nth - 1]
        assert state.services[last].pid is None
        left = processes.marked(state.stack)
        assert len(left) >= nth
        assert stack.down(folder)
        assert_gone(state, left)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_port_in_use_is_named_with_its_owner(folder: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(StackError) as caught:
            stack.up(folder, mlflow_port=port)
    assert f"port {port} for MLflow" in str(caught.value)
    assert "pid" in caught.value.found
    assert processes.marked(state_of(folder).stack) == []


def test_a_server_that_dies_shows_its_last_words_and_takes_the_others_along(folder: Path) -> None:
    states.prepare(folder)
    (folder / "mlflow" / "mlflow.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(StackError, match="MLflow") as caught:
        stack.up(folder)
    assert "file is not a database" in str(caught.value)
    assert processes.marked(state_of(folder).stack) == []


def test_a_full_disk_is_refused_before_anything_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "_LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(StackError, match="GB free"):
        stack.up(folder)
    assert processes.marked(state_of(folder).stack) == []
