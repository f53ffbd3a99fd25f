"""Captures: what a step with a bad loss was made of, in the run's folder, at most two of a run.

```
<runs>/<name>/captures/1/claim.json     step and rank that the place belongs to
<runs>/<name>/captures/1/...            a checkpoint (`ssl_core.train.checkpoint`) of the state before the step, with
                                        the batch of that rank under `batch`
```
"""

import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from ssl_core.train.checkpoint import Snapshot
from storage.errors import StoreError
from storage.objects import join, open_store
from storage.objects.retry import RetryPolicy

FOLDER = "captures"
MOST = 2
"""Captures of a run: each holds a whole state."""
_PATIENCE = RetryPolicy(deadline_s=60.0)


class Captures:
    """Writes captures of one rank; never ends a run.

    Args:
        url: Of the run's folder.
        say: Takes a line for the log.
    """

    def __init__(self, url: str, say: Callable[[str], None]) -> None:
        self._url, self._say = join(url, FOLDER), say
        self._writers: list[threading.Thread] = []

    def put(self, snapshot: Snapshot, *, wait: bool) -> None:
        """Write a capture beside the training that goes on; `wait` where the run is about to end."""
        writer = threading.Thread(target=self._write, args=(snapshot,), name="capture", daemon=True)
        writer.start()
        self._writers.append(writer)
        if wait:
            self.close()

    def close(self) -> None:
        """Wait for what is being written, at most as long as a store that is away is waited for."""
        while self._writers:
            self._writers.pop().join(2 * _PATIENCE.deadline_s)

    def _write(self, snapshot: Snapshot) -> None:
        step, loss = snapshot.meta["step"], snapshot.meta["loss"]
        try:
            place = self._claimed(snapshot)
            if place is None:
                return
            store = open_store(join(self._url, place), _PATIENCE)
            with tempfile.TemporaryDirectory(prefix="tomoscale-capture-") as folder:
                files = sorted(snapshot.save(Path(folder) / "capture").iterdir(), key=_manifest_last)
                for file in files:
                    store.put(file.name, file.read_bytes())
            self._say(f"step {step}: loss {loss}, captured; `tomoscale replay {store.url}` runs that step alone")
        except (StoreError, OSError) as error:  # the run has a matter of its own to tell
            self._say(f"step {step}: loss {loss}, not captured: {error}")

    def _claimed(self, snapshot: Snapshot) -> str | None:
        """A place that nobody has; None where there is none, or the step has one: a run that starts again meets it."""
        store = open_store(self._url, _PATIENCE)
        claim = {"step": snapshot.meta["step"], "rank": snapshot.meta["rank"]}
        for number in range(1, MOST + 1):
            key = f"{number}/claim.json"
            if store.put(key, json.dumps(claim).encode(), if_absent=True):
                return str(number)
            if json.loads(store.get(key))["step"] == claim["step"]:
                return None
        return None


def _manifest_last(file: Path) -> tuple[bool, str]:
    return file.name == "manifest.json", file.name
