import json
import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest

from cluster import services, stack
from cluster import state as states
from storage.errors import ConfigError, StackError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(states, "_LONGEST", 4096)  # pytest's folders are long; only Ray minds
    return tmp_path / "state"


def test_what_is_made_is_private_and_made_once(folder: Path) -> None:
    old = os.umask(0)
    try:
        first = states.prepare(folder)
        services.write_credentials(folder)
    finally:
        os.umask(old)
    secrets = {path.name: path.read_text() for path in (folder / "secrets").iterdir()}
    assert mode(folder) == 0o700
    assert {mode(path) for path in (folder / "secrets").iterdir()} == {0o600}
    assert mode(folder / "state.json") == 0o600
    assert len(set(secrets.values())) == len(secrets)
    assert states.prepare(folder).stack == first.stack
    services.write_credentials(folder)
    assert {path.name: path.read_text() for path in (folder / "secrets").iterdir()} == secrets


def test_state_survives_writing(folder: Path) -> None:
    state = states.prepare(folder)
    state.services["s3"] = states.Service(pid=7, created=1.5, ports={"s3": 1234}, healthy_s=3.0)
    states.save(folder, state)
    assert states.load(folder) == state
    assert not list(folder.glob("*.part"))


def test_a_path_too_long_for_sockets_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    with pytest.raises(ConfigError, match="TOMOSCALE_STATE") as caught:
        states.prepare(long)
    assert "bytes" in caught.value.found
    assert not long.exists()


def test_the_longest_path_leaves_room_for_the_longest_socket() -> None:
    # 107 bytes is what Linux takes; process numbers end at 4194304.
    session = "session_2026-01-01_00-00-00_000000_4194304"
    assert states._LONGEST + len(f"/ray/{session}/sockets/plasma_store") == 107


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_LONGEST", 4096)
    (tmp_path / "file").write_text("")
    with pytest.raises(StackError, match="TOMOSCALE_STATE"):
        states.prepare(tmp_path / "file" / "state")


def test_what_was_started_is_stopped_though_nobody_reads_any_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends `| tee` too, so that the next line raises."""
    stopped: list[list[str]] = []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def say(line: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(stack, "_start", interrupted)
    monkeypatch.setattr(stack, "_stop", lambda folder, state, names, progress: stopped.append(names))
    with pytest.raises(KeyboardInterrupt):
        stack.up(folder, progress=say)
    assert stopped == [["s3", "mlflow", "ray"]]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stack": "a"}', '{"stack": "a", "services": {"s3": {"odd": 1}}}'])
def test_a_damaged_state_is_named(folder: Path, text: str) -> None:
    states.prepare(folder)
    (folder / "state.json").write_text(text)
    with pytest.raises(StackError, match="state.json"):
        states.load(folder)
    with pytest.raises(StackError, match="state.json"):
        stack.down(folder)


def _hold(folder: str, ready: str) -> None:
    with states.locked(Path(folder)):
        Path(ready).write_text("")
        time.sleep(600)


def test_one_at_a_time_and_a_dead_holder_lets_go(folder: Path) -> None:
    states.prepare(folder)
    ready = folder / "ready"
    holder = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(folder), str(ready)))
    holder.start()
    try:
        deadline = time.monotonic() + 120
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(StackError, match="another"), states.locked(folder, wait_s=0.2):
            pass
    finally:
        holder.kill()
        holder.join()
    with states.locked(folder, wait_s=60.0):
        pass


def _prepare(folder: str, go: str) -> None:
    states._LONGEST = 4096
    while not Path(go).exists():
        time.sleep(0.001)
    state = states.prepare(Path(folder))
    (Path(folder) / f"{os.getpid()}.id").write_text(state.stack + states.secret(Path(folder), "ray_token"))


def test_two_that_start_together_have_one_stack_and_one_secret(folder: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=_prepare, args=(str(folder), str(tmp_path / "go"))) for _ in range(3)]
    for process in both:
        process.start()
    time.sleep(0.5)  # most likely all wait by then
    (tmp_path / "go").touch()
    for process in both:
        process.join(240)
        assert process.exitcode == 0
    found = {path.read_text() for path in folder.glob("*.id")}
    state = states.load(folder)
    assert state is not None
    assert found == {state.stack + states.secret(folder, "ray_token")}
    assert not list(folder.glob("**/*.part"))


def test_what_is_there_is_kept_where_it_is_to_be(folder: Path) -> None:
    folder.mkdir()
    for text, keep, kept in (("one", True, "one"), ("two", True, "one"), ("three", False, "three")):
        states.write_private(folder / "file", text, keep=keep)
        assert (folder / "file").read_text() == kept
        assert mode(folder / "file") == 0o600
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_nothing_started_is_nothing_to_stop(folder: Path) -> None:
    assert stack.down(folder) is False
    info = stack.status(folder)
    assert not info.running
    assert not info.healthy
    assert json.dumps(info.to_json())
    with pytest.raises(StackError, match="tomoscale up"):
        stack.environment(folder)
    with pytest.raises(StackError, match="tomoscale up"):
        _ = info.jobs_address
