"""Checkpoints that are written and sent to the runs' storage while training goes on."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from ssl_core.train.checkpoint import Snapshot


class Uploads:
    """The checkpoints of one worker; at most one is under way, since each holds a copy of the whole state.

    A checkpoint counts when all of it is in the storage: only then Ray Train hears of it. A store that is away is
    waited for by the file system's own retries, meanwhile training goes on; an upload that fails for good ends the
    group, which starts again from the checkpoint before.

    Args:
        require: Called before anything is written; raises where this job must not write any more.
        done: Called with the seconds and the bytes of a checkpoint that is in the storage.
        train: Ray Train, or what stands in for it in a benchmark.
    """

    def __init__(
        self,
        require: Callable[[], None],
        done: Callable[[float, int], None] = lambda _seconds, _size: None,
        train: Any = ray.train,
    ) -> None:
        self._require, self._done, self._train = require, done, train
        self._idle = threading.Event()
        self._idle.set()

    def report(self, name: str, metrics: dict[str, Any], take: Callable[[], Snapshot] | None) -> None:
        """Report to Ray Train, a collective call; waits for the upload before this one, and not for this one.

        Args:
            name: Of the checkpoint's directory in the run's storage.
            metrics: Go with the checkpoint.
            take: Copies the state; None on ranks that write none.
        """
        upload, directory = None, None
        if take is not None:
            self._idle.wait()
            snapshot = take()
            self._idle.clear()
            directory = Checkpoint.from_directory(tempfile.mkdtemp(prefix="tomoscale-"))
            upload = partial(self._upload, self._train.get_context().get_storage(), snapshot)
        self._train.report(
            metrics,
            checkpoint=directory,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,  # this does, also where the upload fails
        )

    def _upload(self, storage: Any, snapshot: Snapshot, directory: Checkpoint, name: str) -> Checkpoint:
        """Called in a thread of Ray's."""
        folder = Path(directory.path)
        try:
            self._require()
            began = time.monotonic()
            snapshot.save(folder / "checkpoint")
            size = sum(path.stat().st_size for path in (folder / "checkpoint").rglob("*") if path.is_file())
            persisted: Checkpoint = storage.persist_current_checkpoint(
                Checkpoint.from_directory(folder / "checkpoint"), name
            )
            self._done(time.monotonic() - began, size)
            return persisted
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._idle.set()
