"""Searches that began before the journal: their trials as Ray Tune's own state has them."""

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from jobs.configs.search import TuneConfig
from jobs.output import last_line
from jobs.tune.journal import DONE, FAILED, STOPPED, Entry
from jobs.tune.live import METRIC
from ssl_core.downstream.search import settings_from
from storage.errors import NotFound, StackError
from storage.objects import join, open_store

TRIALS = "trials.json"
"""Ids of a search's trials in the order of their numbers, below `<runs>/<name>`."""


def entries(config: TuneConfig) -> list[Entry]:
    """Trials of a search that an earlier version began, by number; none where none did.

    One that had not ended waits to run again.

    Raises:
        StoreError: the store does not answer.
    """
    store = open_store(join(config.runs, config.name))
    if not any(key.startswith("experiment_state-") for key in store.list()):
        return []
    from ray.tune import ExperimentAnalysis, ResultGrid

    from jobs.on_ray.filesystem import storage_for

    path, filesystem = storage_for(config.runs)
    analysis = ExperimentAnalysis(f"{path}/{config.name}", storage_filesystem=filesystem)
    ended = {trial.trial_id for trial in analysis.trials or () if trial.status in ("TERMINATED", "ERROR")}
    grid = ResultGrid(analysis)
    every = (grid[index] for index in range(len(grid)))
    results = [result for result in every if result.metrics and "trial_id" in result.metrics]
    numbers = numbers_of(config, results)
    return sorted((_entry(config, r, numbers, ended) for r in results), key=lambda entry: entry.number)


def numbers_of(config: TuneConfig, results: Sequence[Any]) -> dict[str, int]:
    """The number of each trial by its id, the same at every start of the search.

    Ray Tune lists the trials of a continued search by when they last reported. Their ids were therefore kept beside the
    search's state, first in the order of creation; a trial that is new to the list comes after those in it.

    Args:
        config: The search.
        results: Ray Tune's, in any order.

    Raises:
        StoreError: the list cannot be read or written.
    """
    store = open_store(join(config.runs, config.name))
    try:
        ids: list[str] = json.loads(store.get(TRIALS))
    except NotFound:
        ids = []
    new = [result for result in results if result.metrics["trial_id"] not in ids]
    if new:
        ids += [result.metrics["trial_id"] for result in sorted(new, key=_created)]
        store.put(TRIALS, json.dumps(ids).encode())
    return {trial_id: number for number, trial_id in enumerate(ids)}


def _entry(config: TuneConfig, result: Any, numbers: dict[str, int], ended: set[str]) -> Entry:
    trial_id = result.metrics["trial_id"]
    frame = result.metrics_dataframe
    scores = _last_attempt(frame) if frame is not None and METRIC in frame else []
    entry = Entry(numbers[trial_id], trial_id, settings_from(result.config), epochs_spent=len(scores))
    if trial_id not in ended:
        return entry
    entry.scores, entry.at = scores, len(scores)
    if result.error is not None:
        entry.status, entry.error = FAILED, last_line(result.error)
    elif len(scores) < config.finetune.epochs:
        entry.status, entry.why = STOPPED, f"asha at epoch {len(scores)}"
    else:
        entry.status = DONE
    return entry


def _created(result: Any) -> tuple[int, str]:
    """When a trial was created, as its folder says it: Ray Tune puts a count of trials after the id."""
    trial_id, folder = result.metrics["trial_id"], PurePosixPath(result.path).name
    count = re.search(rf"_{re.escape(trial_id)}_(\d+)", folder)
    if count is None:
        raise StackError(
            f"folder {folder} of a trial",
            expected=f"the id {trial_id} and a number after it",
            found="another name",
            remedy="install the Ray of requirements.lock",
        )
    return int(count[1]), trial_id


def _last_attempt(frame: Any) -> list[float]:
    """The metric by epoch; a trial that began again after a death has reported its first epochs twice."""
    epochs = frame["epoch"].tolist()
    began = max(row for row, epoch in enumerate(epochs) if epoch == min(epochs))
    return [float(score) for score in frame[METRIC].tolist()[began:]]
