"""One job of a name at a time, through whatever client: the lease beside its checkpoints."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import lease as leases
from jobs.lease import Lease, LeaseLost
from jobs.on_ray.failures import FINAL
from jobs.pretrain import driver, worker
from jobs.tracking import runs as tracking
from ssl_core.train.checkpoint import Snapshot
from storage.errors import NotFound, StackError, StoreError
from storage.objects import open_store
from storage.objects.local import FileStore
from tests.kit.s3server import S3Server

KEY = "lease-pretrain.json"


@pytest.fixture(params=["file", "s3"])
def runs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/runs"
        return
    server = S3Server()
    try:
        server.start()
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield f"s3://{server.bucket}/runs"
    finally:
        server.remove()


@pytest.fixture
def local(tmp_path: Path) -> str:
    return f"file://{tmp_path}/runs"


def facts(url: str) -> dict[str, object]:
    content: dict[str, object] = json.loads(open_store(f"{url}/n").get(KEY))
    return content


def elsewhere(url: str, **changes: object) -> None:
    """Turn the lease into one of a machine that cannot be looked at from this one."""
    content = {**facts(url), "process": ["other boot", "pid:[1]", 1, 0.0], "host": "node-7", "job": "n-1", **changes}
    open_store(f"{url}/n").put(KEY, json.dumps(content).encode())


def test_of_two_jobs_of_a_name_the_second_ends_with_one_sentence(runs: str) -> None:
    with Lease(runs, "n", "pretrain") as first:
        with pytest.raises(StackError, match=r"job 'n'; expected that no job of this name is at work") as caught:
            Lease(runs, "n", "pretrain", grace_s=0.3).__enter__()
        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)
        assert facts(runs)["token"] == first.token
        with Lease(runs, "n", "tune"), Lease(runs, "m", "pretrain"):
            """Other jobs are not in the way."""
    assert facts(runs)["ended"] is True
    with Lease(runs, "n", "pretrain") as second:
        assert facts(runs)["token"] == second.token


@pytest.mark.parametrize("kind", ["pretrain", "tune", "finetune"])
def test_the_second_job_touches_neither_checkpoints_nor_mlflow(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jobs.finetune
    import jobs.on_ray.room
    import jobs.on_ray.session
    import jobs.tune.driver

    for module in (jobs.on_ray.session, driver):
        monkeypatch.setattr(module, "connect", lambda: None)
    for room in (jobs.on_ray.room, driver):
        monkeypatch.setattr(room, "require_room", lambda *_, **__: None)
    monkeypatch.setattr(tracking, "client", lambda: pytest.fail("MLflow was asked"))
    (tmp_path / "c.yaml").write_text(
        {
            "pretrain": "{name: n, data: 'memory://d', method: {name: simclr}}",
            "tune": "{name: n, encoders: ['none', 'models:/e/1'], labelled: {data: 'memory://d', label: l}}",
            "finetune": "{name: n, starts: {e: 'models:/e/1'}, labelled: {data: 'memory://d', label: l}}",
        }[kind]
    )
    main = {"pretrain": driver.main, "tune": jobs.tune.driver.main, "finetune": jobs.finetune.main}[kind]
    monkeypatch.setattr(Lease.__init__, "__kwdefaults__", {**Lease.__init__.__kwdefaults__, "grace_s": 0.3})
    runs = f"file://{tmp_path}/runs"
    with Lease(runs, "n", kind):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(StackError, match="at work"):
            main([str(tmp_path / "c.yaml"), f"runs={runs}"])
        assert sorted(tmp_path.rglob("*")) == before


OWNER = """
import sys, time
from jobs.lease import Lease
with Lease(sys.argv[1], "n", "pretrain"):
    print("at work", flush=True)
    time.sleep(600)
"""


def test_a_killed_job_of_this_machine_is_followed_at_once(local: str) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, local], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "at work\n"
        with pytest.raises(StackError, match="at work"):
            Lease(local, "n", "pretrain", grace_s=0.3).__enter__()
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        began = time.monotonic()
        with Lease(local, "n", "pretrain"):
            assert time.monotonic() - began < leases.EXPIRE_S / 4
    finally:
        owner.kill()
        owner.wait()


def test_an_owner_that_ends_just_now_is_waited_for(local: str) -> None:
    with Lease(local, "n", "pretrain") as first:
        ending = threading.Timer(0.5, first.__exit__, (None, None, None))
        ending.start()
        with Lease(local, "n", "pretrain") as second:
            assert facts(local)["token"] == second.token
            ending.join()
        first._content = b""  # released before


@pytest.mark.parametrize("since", ["1970-01-01 00:00:00 +0000", "2999-01-01 00:00:00 +0000"])
def test_a_lease_is_judged_by_its_changes_and_not_by_clocks(local: str, since: str) -> None:
    with Lease(local, "n", "pretrain", renew_s=60.0):
        """Written."""
    elsewhere(local, since=since, ended=False)
    lines: list[str] = []
    began = time.monotonic()
    with Lease(local, "n", "pretrain", expire_s=1.0, say=lines.append):
        assert time.monotonic() - began > 1.0
    assert "n-1 on node-7" in lines[0]
    elsewhere(local, since=since, ended=False)
    stop = threading.Event()

    def renew() -> None:
        beat = 0
        while not stop.wait(0.3):
            beat += 1
            elsewhere(local, since=since, ended=False, beat=beat)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(StackError, match="n-1 on node-7 since") as caught:
            Lease(local, "n", "pretrain", expire_s=5.0, grace_s=1.0, say=lines.append).__enter__()
    finally:
        stop.set()
        thread.join()
    assert "tomoscale jobs logs n-1 --follow" in caught.value.remedy


def test_a_job_that_lost_its_lease_stops_before_it_writes(local: str) -> None:
    other = json.dumps({"token": "another"}).encode()

    def work() -> None:
        with Lease(local, "n", "pretrain", renew_s=0.2, say=lambda _line: None) as lease:
            leases.require(local, "n", "pretrain", lease.token)
            open_store(f"{local}/n").put(KEY, other)
            with pytest.raises(LeaseLost):
                leases.require(local, "n", "pretrain", lease.token)
            time.sleep(30)  # cut short
            pytest.fail("the main thread was not interrupted")

    with pytest.raises(LeaseLost, match="another job of this name has taken it over") as caught:
        work()
    assert isinstance(caught.value, FINAL)
    assert open_store(f"{local}/n").get(KEY) == other, "it is not released either"


def test_a_worker_writes_no_checkpoint_without_the_lease(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.train
    import ray.train.torch

    from jobs.configs import PretrainConfig
    from ssl_core.config import resolved

    config = PretrainConfig.model_validate({"name": "n", "data": "memory://d", "runs": local})
    names: list[str] = []

    class Context:
        def get_world_rank(self) -> int:
            return 1

        def get_world_size(self) -> int:
            return 2

        def get_local_world_size(self) -> int:
            return 2

        def get_local_rank(self) -> int:
            return 1

        def get_storage(self) -> "Context":
            return self

        def persist_current_checkpoint(self, checkpoint: object, name: str) -> object:
            names.append(name)
            return checkpoint

    def run(_config: object, hooks: object, **_: object) -> None:
        hooks.publish(1, lambda: Snapshot({}, {}), {})  # type: ignore[attr-defined]

    def report(
        _metrics: object, *, checkpoint: object, checkpoint_dir_name: str, checkpoint_upload_fn: Any, **_: object
    ) -> None:
        checkpoint_upload_fn(checkpoint, checkpoint_dir_name)  # in a thread, of Ray's

    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: None)
    monkeypatch.setattr(worker, "run", run)
    with Lease(local, "n", "pretrain") as lease:
        payload = {"config": resolved(config), "run_id": "r", "lease": lease.token}
        worker.train_loop(payload)
        assert names == ["step-00000001"]
        with pytest.raises(LeaseLost):
            worker.train_loop({**payload, "lease": "of before"})
        assert names == ["step-00000001"]


def test_a_store_that_is_away_loses_no_lease(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    swap, away, lines = FileStore.swap, threading.Event(), list[str]()

    def faulty(self: FileStore, key: str, data: bytes, expected: bytes | None) -> bool:
        if away.is_set():
            raise StoreError(key, found="no route")
        return swap(self, key, data, expected)

    monkeypatch.setattr(FileStore, "swap", faulty)
    with Lease(local, "n", "pretrain", renew_s=0.2, say=lines.append) as lease:
        away.set()
        time.sleep(1.0)
        before = facts(local)
        away.clear()
        until = time.monotonic() + 30
        while facts(local) == before and time.monotonic() < until:
            time.sleep(0.1)
        assert facts(local) != before, "it is renewed again"
        lease.check()
    assert lines == ["the lease of n could not be renewed (no route); trying on"]


def test_an_answer_that_was_lost_loses_no_lease(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    swap, lost = FileStore.swap, threading.Event()

    def forgetful(self: FileStore, key: str, data: bytes, expected: bytes | None) -> bool:
        done = swap(self, key, data, expected)
        if not lost.is_set() and expected is not None:
            lost.set()
            return False
        return done

    monkeypatch.setattr(FileStore, "swap", forgetful)
    with Lease(local, "n", "pretrain", renew_s=0.1) as lease:
        assert lost.wait(30)
        time.sleep(0.5)
        lease.check()
    assert facts(local)["ended"] is True


def test_a_lease_that_somebody_deleted_is_made_again(local: str) -> None:
    store = open_store(f"{local}/n")
    with Lease(local, "n", "pretrain", renew_s=0.1) as lease:
        store.delete(KEY)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                if facts(local)["token"] == lease.token:
                    break
            except NotFound:
                time.sleep(0.05)
        lease.check()
