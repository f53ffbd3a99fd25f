"""Trials of earlier searches, as MLflow has them, to start from."""

import json
from typing import Any

from jobs.configs.search import TuneConfig
from jobs.configs.space import ENCODER
from jobs.tune.live import EXPLOITED_TAG, METRIC, SETTINGS_TAG
from jobs.tune.suggest import Earlier, fits
from ssl_core.downstream.search import settings_from
from storage.errors import ConfigError


def earlier_trials(config: TuneConfig, api: Any) -> list[Earlier]:
    """Trials of the searches that `from_searches` names, as far as they could be trials of this space.

    Raises:
        ConfigError: MLflow has no such search, or none of its trials fits.
    """
    return [trial for name in config.from_searches for trial in _of_search(config, name, api)]


def _of_search(config: TuneConfig, name: str, api: Any) -> list[Earlier]:
    thing = f"from_searches: {name}"
    record = api.get_experiment_by_name(config.experiment)
    jobs = _runs(api, record, "tune")
    parents = [run.info.run_id for run in jobs if run.data.tags.get("tomoscale.job") == name]
    if not parents:
        names = sorted({run.data.tags.get("tomoscale.job", "") for run in jobs} - {config.name})
        raise ConfigError(
            thing,
            expected=f"a search of experiment {config.experiment!r}",
            found=f"none; it has {', '.join(names[:10]) or 'no other'}",
        )
    children = [run for run in _runs(api, record, "trial") if run.data.tags.get("mlflow.parentRunId") in parents]
    trials = [trial for run in children if (trial := _trial(api, run)) is not None]
    usable = [trial for trial in trials if fits(trial.settings, config.dimensions)]
    print(f"starting from {len(usable)} of {len(trials)} trials of search {name}", flush=True)
    if not usable:
        paths = ", ".join(dim.path for dim in config.dimensions)
        raise ConfigError(
            thing,
            expected=f"trials with values that this space holds of {paths}",
            found=f"none among {len(trials)}",
            remedy="widen the space, give the same encoder versions, or leave the search out",
        )
    return usable


def _runs(api: Any, record: Any, kind: str) -> list[Any]:
    runs: list[Any] = []
    token = None
    while record is not None:
        query = f"tags.`tomoscale.kind` = '{kind}'"
        page = api.search_runs([record.experiment_id], query, max_results=1000, page_token=token)
        runs += page
        if not (token := page.token):
            break
    return runs


def _trial(api: Any, run: Any) -> Earlier | None:
    """A trial that ended well; None of others, and of members of a population, whose score is not of one choice."""
    if run.info.status != "FINISHED" or EXPLOITED_TAG in run.data.tags:
        return None
    if SETTINGS_TAG in run.data.tags:
        settings = json.loads(run.data.tags[SETTINGS_TAG])
    else:
        settings = {k: v if k == ENCODER else float(v) for k, v in settings_from(run.data.params).items()}
    points = {metric.step: metric.value for metric in api.get_metric_history(run.info.run_id, METRIC)}
    scores = tuple(points[step] for step in sorted(points))
    stopped = run.data.tags.get("tomoscale.stopped_early") == "True"
    seconds = ((run.info.end_time or 0) - run.info.start_time) / 1000
    return Earlier(settings, scores, stopped, seconds) if scores else None
