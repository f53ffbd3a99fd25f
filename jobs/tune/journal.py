"""The trials of a search on object storage: one object a trial, written before it starts and when it ends."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from ssl_core.downstream.records import from_fields
from ssl_core.downstream.search import Takeover
from storage.objects import join, open_store

FOLDER = "search"
WAITING, RUNNING, PAUSED, DONE, STOPPED, FAILED = "waiting", "running", "paused", "done", "stopped", "failed"
ENDED = (DONE, STOPPED, FAILED)


@dataclass
class Entry:
    """A trial as its search knows it; changes while it runs.

    Attributes:
        number: In the order of creation, from 0.
        id: The same at every start of the search.
        settings: By dotted path.
        arm: Which search it belongs to where random weights have one of their own.
        status: One of the words of this module.
        scores: By epoch, of the last attempt.
        base: Epochs of it that a rung has judged; a next attempt repeats them at most.
        at: Last epoch that the attempt reported.
        seconds: Of its training up to the last epoch.
        epochs_spent: Epochs of all attempts.
        seconds_spent: Seconds of all attempts.
        why: What ended it early.
        error: Why it failed.
        takeovers: Of a member of a population, in their order.
        clock_ahead: Seconds by which the clock of the weights that it goes on from is ahead of its own.
    """

    number: int
    id: str
    settings: dict[str, Any]
    arm: int = 0
    status: str = WAITING
    scores: list[float] = field(default_factory=list)
    base: int = 0
    at: int = 0
    seconds: float = 0.0
    epochs_spent: int = 0
    seconds_spent: float = 0.0
    why: str = ""
    error: str | None = None
    takeovers: list[Takeover] = field(default_factory=list)
    clock_ahead: float = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ENDED


class Journal:
    """Entries below `<runs>/<name>/search`; see `storage.objects` for what a write survives.

    Args:
        runs: URL below which jobs keep their state.
        name: Of the search.
    """

    def __init__(self, runs: str, name: str) -> None:
        self._store = open_store(join(runs, name, FOLDER))

    def read(self) -> list[Entry]:
        """Every trial, by number; one that was running when its driver died waits to run again.

        Raises:
            StoreError: the store does not answer.
        """
        entries = []
        for key in sorted(self._store.list()):
            if key.startswith("trial-"):
                entries.append(_entry(json.loads(self._store.get(key))))
        return sorted(entries, key=lambda entry: entry.number)

    def seconds(self) -> float:
        """How long all starts of the search have run, as last noted."""
        note = self._note("clock.json")
        return float(note["seconds"]) if note else 0.0

    def write(self, entry: Entry, seconds: float) -> None:
        """Keep a trial as it is, and how long the search has run."""
        self._store.put(f"trial-{entry.number:06d}.json", json.dumps(asdict(entry)).encode())
        self._store.put("clock.json", json.dumps({"seconds": seconds}).encode())

    def once(self, key: str, values: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """What the first start kept under a key; where this is the first, what `values` gives."""
        note = self._note(key)
        if note is None:
            note = values()
            self._store.put(key, json.dumps(note).encode())
        return list(note)

    def _note(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.exists(key) else None


def _entry(data: dict[str, Any]) -> Entry:
    entry = from_fields(Entry, {"takeovers": [], "clock_ahead": 0.0, **data})
    entry.scores = list(entry.scores)  # `from_fields` makes tuples
    entry.takeovers = [from_fields(Takeover, takeover) for takeover in data.get("takeovers", ())]
    if entry.status == RUNNING:
        entry.status = WAITING
        entry.at = 0
        del entry.scores[entry.base :]
    return entry
