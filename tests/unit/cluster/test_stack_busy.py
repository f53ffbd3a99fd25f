"""A Ray that gives up on itself on a busy machine is started again; one that ends for another reason is not."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster import services, stack
from cluster.state import Service, State
from storage.errors import StackError

OURS = psutil.Process()


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, last_words: str) -> list[str]:
    """Start Ray, which ends with these words the first time, and lives the second; returns what was said."""
    log = folder / "ray.log"
    state = State(stack="s", services={"ray": Service(ports={})})
    launches: list[str] = []

    def launch(*_: object) -> dict[str, SimpleNamespace]:
        launches.append("ray")
        log.write_text(last_words if len(launches) == 1 else "")
        probe: Callable[[], str] = lambda: ""  # noqa: E731
        return {"ray": SimpleNamespace(name="ray", log=log, probe=probe)}

    monkeypatch.setattr(stack, "_launch", launch)
    monkeypatch.setattr(stack, "_main", lambda _state, name: OURS if name != "ray" or len(launches) > 1 else None)
    monkeypatch.setattr(stack.states, "save", lambda *_: None)
    lines: list[str] = []
    stack._start(folder, state, stack.states.SERVICES, ["ray"], {}, None, lines.append)
    return lines


def test_a_ray_that_gave_up_on_a_busy_machine_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"Exception: The current node {services.IMPATIENT}."
    lines = start(monkeypatch, tmp_path, words)
    assert any("starting it again" in line for line in lines)
    assert any("answers after" in line for line in lines)


def test_a_ray_that_ends_for_another_reason_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StackError, match="ended while it started"):
        start(monkeypatch, tmp_path, "Exception: no room")
