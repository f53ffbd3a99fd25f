"""Checkpoints of a trial: where an attempt that died goes on, with the seconds that its epochs took."""

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from jobs.configs.search import TuneConfig
from jobs.finetune.checkpoints import StoredCheckpoints
from jobs.tune.journal import WAITING, Entry
from jobs.tune.rules import levels
from ssl_core.downstream.finetune import Checkpoints
from ssl_core.train import checkpoint
from storage.errors import StackError
from storage.objects import join

FOLDER = "checkpoints"
"""Of a search, below `<runs>/<name>`; empty when it has ended."""
_SECONDS = "seconds"


class TimedCheckpoints:
    """Checkpoints that know when each epoch had ended, in seconds of training; see `Checkpoints`.

    Args:
        stored: Where they are kept.
        surely: Epochs whose state is kept however short the time since the last.
        clock: Seconds from a fixed point; it runs from now on.
        source: Where a member of a population goes on from while it has kept nothing itself.
        base: Epochs that `source` must have.

    Attributes:
        restored: Epochs that an earlier attempt has trained.
    """

    def __init__(
        self,
        stored: Checkpoints,
        surely: Collection[int] = (),
        clock: Callable[[], float] = time.monotonic,
        *,
        source: Checkpoints | None = None,
        base: int = 0,
    ) -> None:
        self._stored, self._surely, self._clock = stored, surely, clock
        self._source, self._base = source, base
        self._began = clock()
        self._seconds: list[float] = []
        self.restored = 0

    def newest(self) -> Path | None:
        """See `Checkpoints.newest`.

        Raises:
            StackError: the state that a member of a population was to go on from is not there.
        """
        path = self._stored.newest()
        if path is None and self._source is not None:
            path = self._source.newest()
            epochs = 0 if path is None else len(checkpoint.read_meta(path)[_SECONDS])
            if epochs != self._base:
                raise StackError(
                    "weights to go on from",
                    expected=f"the state after epoch {self._base} of the trial that is taken over",
                    found=f"one after epoch {epochs}" if epochs else "none",
                    remedy="leave the search's checkpoints alone while it runs; another name starts anew",
                )
        if path is not None:
            self._seconds = [float(s) for s in checkpoint.read_meta(path)[_SECONDS]]
            self.restored = len(self._seconds)
            self._began = self._clock() - self._seconds[-1]
        return path

    def save(self, state: Mapping[str, Any], meta: Mapping[str, Any], *, last: bool) -> None:
        """See `Checkpoints.save`; called once an epoch."""
        self._seconds.append(self._clock() - self._began)
        last = last or len(self._seconds) in self._surely
        self._stored.save(state, {**meta, _SECONDS: self._seconds}, last=last)

    def seconds(self, epoch: int) -> float:
        """Of training up to the end of an epoch, from 1; up to now where none was saved."""
        return self._seconds[epoch - 1] if epoch <= len(self._seconds) else self._clock() - self._began


def rungs_of(config: TuneConfig) -> tuple[int, ...]:
    """Epochs after which a trial waits for others, and may go on later in another process."""
    return levels(config) if config.waits else ()


def of_attempt(config: TuneConfig, settings: Mapping[str, Any]) -> TimedCheckpoints:
    """Those of an attempt of a trial.

    Each stretch of a member of a population, from a round to the next, has a place of its own: what others go on from
    stays there until all have gone on.

    Args:
        config: The search.
        settings: Number and id of the trial; of a member `base`, the epochs before the stretch, and `source`, number
            and id of the trial whose weights it goes on from.
    """
    number, trial_id = settings["number"], settings["id"]
    if not config.is_population:
        return TimedCheckpoints(of_trial(config, number, trial_id), rungs_of(config))
    base = settings["base"]
    source = None
    if base:
        source_number, source_id = settings["source"]
        source = of_stretch(config, source_number, source_id, base - config.population.interval)
    return TimedCheckpoints(of_stretch(config, number, trial_id, base), rungs_of(config), source=source, base=base)


def clear_needless(config: TuneConfig, entry: Entry) -> None:
    """Remove what nobody goes on from any more, now that an entry has come so far."""
    if not config.is_population:
        if entry.has_ended:
            of_trial(config, entry.number, entry.id).clear()
        return
    before = entry.base - 2 * config.population.interval
    if entry.has_ended:  # what it had at its last round others may still go on from
        of_stretch(config, entry.number, entry.id, entry.base).clear()
    elif entry.status == WAITING and before >= 0:  # all have come to this round
        of_stretch(config, entry.number, entry.id, before).clear()


def of_stretch(config: TuneConfig, number: int, trial_id: str, base: int) -> StoredCheckpoints:
    """Where the checkpoints of a member of a population lie, of the stretch after `base` epochs."""
    return StoredCheckpoints(join(url_of(config), f"{number}-{trial_id}", f"after-{base}"))


def of_trial(config: TuneConfig, number: int, trial_id: str) -> StoredCheckpoints:
    """Where the checkpoints of a trial lie."""
    return StoredCheckpoints(join(url_of(config), f"{number}-{trial_id}"))


def url_of(config: TuneConfig) -> str:
    """Where the checkpoints of all trials lie."""
    return join(config.runs, config.name, FOLDER)
