"""Each trial as a child run in MLflow while it runs: parameters at its start, points as epochs end, how it ended.

A thread sends, in order, so that the search never waits. While the server is away everything waits; what is missing in
the end is sent then.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs import driver
from jobs.configs.search import TuneConfig
from jobs.output import last_line
from jobs.tracking import runs as tracking
from jobs.tracking.outage import is_away, through_outage
from jobs.tune.journal import Entry
from ssl_core.downstream.search import Trial

METRIC = "inner_dice"
SETTINGS_TAG = "tomoscale.settings"
EXPLOITED_TAG, NOW_TAG = "tomoscale.exploited", "tomoscale.settings.now"
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 5.0


@dataclass(frozen=True)
class _Facts:
    """What a child run says of a trial, as it is now.

    Attributes:
        number: Of the trial.
        settings: What it began with, by dotted path.
        tags: Its id, and of a member of a population whose weights it took over when, and its settings since.
    """

    number: int
    settings: dict[str, Any]
    tags: dict[str, str]


def _facts_of(number: int, trial: Entry | Trial) -> _Facts:
    settings = dict(trial.settings)
    tags = {"tomoscale.trial": trial.id, SETTINGS_TAG: json.dumps(settings)}
    if trial.takeovers:
        words = [f"trial {takeover.source} at epoch {takeover.epoch}" for takeover in trial.takeovers]
        tags |= {EXPLOITED_TAG: ", ".join(words)[-5000:], NOW_TAG: json.dumps(dict(trial.takeovers[-1].settings))}
    return _Facts(number, settings, tags)


class Live:
    """Sends what becomes of trials from a thread; a `jobs.tune.state.Listener`.

    Args:
        config: The search.
        run_id: Its run.
        api: MLflow's client, for the thread alone.
    """

    def __init__(self, config: TuneConfig, run_id: str, api: Any) -> None:
        self._config, self._run_id, self._api = config, run_id, api
        self._children: dict[int, str] = {}
        self._points: dict[int, list[tracking.Point]] = {}
        self._open: set[int] = set()
        self._complete: dict[int, str] = {}
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-trials", daemon=True)
        self._thread.start()

    def began(self, entry: Entry, *, fresh: bool) -> None:
        """An attempt begins; the child of one whose epochs do not count is deleted, so that none has those of two."""
        if fresh:
            self._points[entry.number] = []
        self._complete.pop(entry.number, None)
        self._queue.put(partial(self._begin, _facts_of(entry.number, entry), fresh=fresh))

    def reported(self, entry: Entry, epoch: int, metrics: dict[str, float]) -> None:
        """An epoch has ended."""
        point = tracking.point(epoch, metrics)
        self._points.setdefault(entry.number, []).append(point)
        self._queue.put(partial(self._send, entry.number, point))

    def ended(self, entry: Entry) -> None:
        """The trial is over."""
        status = "FAILED" if entry.error is not None else "FINISHED"
        self._queue.put(partial(self._end, _facts_of(entry.number, entry), status, entry.why, entry.error))

    def close(self, timeout_s: float = 30.0) -> None:
        """Send what waits, for at most `timeout_s`."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        self._closing.set()
        self._thread.join(timeout_s)

    def interrupted(self) -> None:
        """End the runs of trials that an end of the search cut off; they go on when it does."""
        for number in sorted(self._open):
            driver.end_run(self._api, self._children[number], "KILLED")

    def complete(self, trials: Iterable[Trial]) -> None:
        """Send what the server lacks of trials that have ended, and wait for it where it is away.

        Raises:
            StackError: it was away for too long.
        """
        for trial in trials:
            # Epochs before a rung may be those of an earlier start, which was killed before it had sent them.
            is_whole = len(self._points.get(trial.trial, ())) == len(trial.scores)
            if not is_whole or self._complete.get(trial.trial) != _outcome(trial.why, trial.error):
                through_outage(partial(self._log, trial), f"the result of trial {trial.trial}")

    def _log(self, trial: Trial) -> None:
        facts = _facts_of(trial.trial, trial)
        child = self._opened(facts)
        timed = {point.step: point for point in self._points.get(trial.trial, ())}
        plain = [tracking.point(epoch, {METRIC: score}) for epoch, score in enumerate(trial.scores, 1)]
        tracking.backfill(self._api, child, [timed.get(point.step, point) for point in plain])
        self._end(facts, "FINISHED" if trial.error is None else "FAILED", trial.why, trial.error)

    def _begin(self, facts: _Facts, *, fresh: bool) -> None:
        child = self._opened(facts)
        if fresh and tracking.steps_on_server(self._api, child):
            self._api.delete_run(child)
            child = self._opened(facts)
        self._open.add(facts.number)

    def _opened(self, facts: _Facts) -> str:
        config = self._config
        child = tracking.open_run(
            self._api,
            config.experiment,
            f"{config.name}-{facts.number}",
            "trial",
            params=facts.settings,
            tags=facts.tags,
            parent=self._run_id,
        )
        self._children[facts.number] = child
        return child

    def _send(self, number: int, point: tracking.Point) -> None:
        # `backfill` asks what the server has: of an attempt that failed nobody knows what had arrived.
        tracking.backfill(self._api, self._children[number], [point])

    def _end(self, facts: _Facts, status: str, why: str, error: str | None) -> None:
        number = facts.number
        child = self._children.get(number) or self._opened(facts)
        self._api.set_tag(child, "tomoscale.stopped_early", str(bool(why)))
        for key, text in (("tomoscale.stopped", why), ("tomoscale.error", error or "")):
            if text:
                self._api.set_tag(child, key, text[:5000])
        self._api.set_terminated(child, status)
        self._open.discard(number)
        self._complete[number] = _outcome(why, error)

    def _work(self) -> None:
        while (step := self._queue.get()) is not None:
            pause, is_said = _FIRST_PAUSE_S, False
            while not self._closing.is_set():
                try:
                    step()
                    break
                except Exception as error:  # noqa: BLE001  whatever the network did, the search goes on
                    if not is_away(error):
                        print(f"MLflow did not take part of a trial, which is sent in the end: {last_line(error)}")
                        return
                    if not is_said:
                        print("MLflow is away; what becomes of trials waits for it", flush=True)
                    is_said = True
                time.sleep(pause)
                pause = min(_MAX_PAUSE_S, 2 * pause)


def _outcome(why: str, error: str | None) -> str:
    return error if error is not None else why
