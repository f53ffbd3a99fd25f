"""Checkpoints of trainings on object storage: a training that died with its node goes on where it was, on any node.

```
<url>/newest.json         step and files of the newest checkpoint, written after they are there
<url>/step-000120/...     the files of `ssl_core.train.checkpoint`
```
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssl_core.train import checkpoint
from storage.errors import NotFound
from storage.objects import open_store

NEWEST = "newest.json"
EVERY_S = 60.0
"""Least seconds between two checkpoints of a training: so much of its work may be lost. Our choice."""


class StoredCheckpoints:
    """The newest checkpoint of a training; see `ssl_core.downstream.finetune.Checkpoints`.

    Args:
        url: Of this training alone.
        every_s: Least seconds between two checkpoints.
        clock: Seconds from a fixed point.
    """

    def __init__(self, url: str, *, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._every_s, self._clock = open_store(url), every_s, clock
        self._began = clock()
        self._restored: tempfile.TemporaryDirectory[str] | None = None

    def newest(self) -> Path | None:
        """A copy of the newest checkpoint on this machine; None before the first.

        Raises:
            StoreError: it cannot be read.
        """
        note = self._note()
        if note is None:
            return None
        self._restored = tempfile.TemporaryDirectory(prefix="tomoscale-training-")
        path = Path(self._restored.name)
        for name in note["files"]:
            (path / name).write_bytes(self._store.get(f"{note['key']}/{name}"))
        return path

    def save(self, state: Mapping[str, Any], meta: Mapping[str, Any], *, last: bool) -> None:
        """Keep a state where the one before it is older than `every_s`, and the last in any case."""
        if self._restored is not None:  # it was read: a process that is stopped later leaves nothing of it
            self._restored.cleanup()
            self._restored = None
        if not last and self._clock() - self._began < self._every_s:
            return
        before, key = self._note(), f"step-{int(state['engine']['step']):06d}"
        with tempfile.TemporaryDirectory(prefix="tomoscale-training-") as folder:
            path = checkpoint.save(Path(folder) / "newest", state, meta)
            files = sorted(file.name for file in path.iterdir())
            for name in files:
                self._store.put(f"{key}/{name}", (path / name).read_bytes())
        self._store.put(NEWEST, json.dumps({"key": key, "files": files}).encode())
        if before is not None and before["key"] != key:
            self._delete(before)
        self._began = self._clock()

    def clear(self) -> None:
        """Remove what there is: the training has ended, and its result is stored."""
        note = self._note()
        if note is not None:
            self._store.delete(NEWEST)
            self._delete(note)

    def _note(self) -> dict[str, Any] | None:
        try:
            note: dict[str, Any] = json.loads(self._store.get(NEWEST))
        except NotFound:
            return None
        return note

    def _delete(self, note: Mapping[str, Any]) -> None:
        for name in note["files"]:
            self._store.delete(f"{note['key']}/{name}")


def clear_all(url: str) -> None:
    """Remove what is left below a URL, when none of the trainings that kept checkpoints there runs any more."""
    store = open_store(url)
    for key in store.list():
        store.delete(key)
