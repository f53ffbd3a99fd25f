"""Uploads of checkpoints beside training. Ray Train is replaced by what it does with them: a thread that calls back."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch

from jobs.on_ray.uploads import Uploads
from ssl_core.train import checkpoint
from ssl_core.train.checkpoint import Snapshot
from storage.errors import StackError


class Ray:
    """Ray Train's side: `store` is where checkpoints end, once it is `open`."""

    def __init__(self, store: Path, patch: pytest.MonkeyPatch) -> None:
        self.store, self.open, self.ends = store, threading.Event(), list[Future[Any]]()
        self._pool = ThreadPoolExecutor(4)
        patch.setattr(ray.train, "report", self.report)
        patch.setattr(ray.train, "get_context", lambda: self)

    def get_storage(self) -> "Ray":
        return self

    def persist_current_checkpoint(self, source: Any, name: str) -> Any:
        assert self.open.wait(60)
        Path(source.path).rename(self.store / name)
        return ray.train.Checkpoint.from_directory(self.store / name)

    def report(self, _metrics: Any, *, checkpoint: Any, checkpoint_upload_fn: Any, **names: Any) -> None:
        if checkpoint is not None:
            self.ends.append(self._pool.submit(checkpoint_upload_fn, checkpoint, names["checkpoint_dir_name"]))


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ray:
    return Ray(tmp_path, monkeypatch)


def test_training_goes_on_while_a_checkpoint_is_on_its_way_and_changes_nothing_of_it(train: Ray) -> None:
    weights, uploads = torch.zeros(3), Uploads(lambda: None)
    uploads.report("step-1", {}, lambda: Snapshot.of({"method": {"w": weights}}, {"step": 1}))
    weights += 1
    assert not train.ends[0].done()
    train.open.set()
    assert train.ends[0].result(60).path == str(train.store / "step-1")
    state, meta = checkpoint.load(train.store / "step-1")
    assert meta == {"step": 1}
    assert state["method"]["w"].tolist() == [0, 0, 0]


def test_one_checkpoint_is_under_way_at_most(train: Ray) -> None:
    uploads, copied = Uploads(lambda: None), threading.Event()

    def take() -> Snapshot:
        copied.set()
        return Snapshot.of({}, {})

    uploads.report("step-1", {}, lambda: Snapshot.of({}, {}))
    second = threading.Thread(target=uploads.report, args=("step-2", {}, take))
    second.start()
    assert not copied.wait(0.3)
    train.open.set()
    second.join(60)
    assert copied.is_set()
    assert [end.result(60).path for end in train.ends] == [str(train.store / f"step-{n}") for n in (1, 2)]


def test_a_job_that_must_not_write_any_more_uploads_nothing_and_blocks_nobody(train: Ray, tmp_path: Path) -> None:
    def refuse() -> None:
        raise StackError("job", expected="its lease", found="another's")

    train.open.set()
    uploads = Uploads(refuse)
    for name in ("step-1", "step-2"):
        uploads.report(name, {}, lambda: Snapshot.of({}, {}))
    for end in train.ends:
        with pytest.raises(StackError, match="its lease"):
            end.result(60)
    assert not list(tmp_path.iterdir())


def test_a_rank_without_a_checkpoint_waits_for_none(train: Ray) -> None:
    Uploads(lambda: pytest.fail("nothing is written")).report("step-1", {}, None)
    assert not train.ends
