"""Checkpoints of a trial: where an attempt that died goes on, with the seconds that its epochs took."""

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from jobs.configs.search import TuneConfig
from jobs.finetune.checkpoints import StoredCheckpoints
from jobs.tune.rules import rungs
from ssl_core.downstream.finetune import Checkpoints
from ssl_core.train import checkpoint
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

    Attributes:
        restored: Epochs that an earlier attempt has trained.
    """

    def __init__(
        self, stored: Checkpoints, surely: Collection[int] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stored, self._surely, self._clock = stored, surely, clock
        self._began = clock()
        self._seconds: list[float] = []
        self.restored = 0

    def newest(self) -> Path | None:
        """See `Checkpoints.newest`."""
        path = self._stored.newest()
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
    return rungs(config.grace_epochs, config.reduction, config.finetune.epochs) if config.waits else ()


def of_trial(config: TuneConfig, number: int, trial_id: str) -> StoredCheckpoints:
    """Where the checkpoints of a trial lie."""
    return StoredCheckpoints(join(url_of(config), f"{number}-{trial_id}"))


def url_of(config: TuneConfig) -> str:
    """Where the checkpoints of all trials lie."""
    return join(config.runs, config.name, FOLDER)
