"""Search of fine-tuning settings as a Ray job: `python -m jobs.tune CONFIG [key=value ...]`.

Every epoch's inner-split metric reaches ASHA, so that trials really stop early; the encoder to start from is one more
dimension of the search. A trial is one task with its own resources and no nested workers, so that trials cannot wait
for each other's CPUs. The search is written to the store and goes on after the driver's death, under the same name.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from jobs import driver
from jobs.configs import SearchSpace, TuneConfig
from jobs.finetune import train_from
from jobs.lease import Lease
from jobs.output import last_line
from jobs.pinning import pinned
from jobs.tracking import runs as tracking
from jobs.tracking.outage import through_outage
from ssl_core.config import parse, resolved
from ssl_core.downstream.records import from_fields
from ssl_core.downstream.search import SearchResult, Trial, TrialSettings
from storage.errors import NotFound, StackError
from storage.objects import join, open_store

# Ray Tune is imported in functions: it reads `_RAY` from the environment, and a wrong configuration need not wait.
METRIC = "inner_dice"
TRIALS = "trials.json"
"""Ids of a search's trials in the order of their numbers, below `<runs>/<name>`."""

_RAY = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 the older reporter is silent; the newer one is not
    # Ray would take Ctrl-C for the end of the search, and half of one would be reported as the whole.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def trial(settings: dict[str, Any], payload: dict[str, Any]) -> None:
    """One trial: fine-tune with `settings`, reporting each epoch."""
    from ray import tune

    config = parse(TuneConfig, payload["config"])
    name = tune.get_context().get_trial_name()

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        print(f"{name} epoch {epoch}: loss {metrics['loss']:.3f}  inner Dice {metrics[METRIC]:.3f}", flush=True)
        tune.report({"epoch": epoch, **metrics})

    changes = {key: settings[key] for key in SearchSpace.model_fields}
    train_from(
        settings["encoder"],
        config.labelled,
        config.finetune.model_copy(update=changes),
        seed=config.seed,
        like=next(uri for uri in config.encoders if uri != "none"),
        on_epoch=on_epoch,
        gpu=config.gpus_per_trial > 0,
    )


def main(argv: Sequence[str]) -> int:
    """Driver: search, log trials to MLflow as child runs, write `result.json`."""
    config = driver.load(TuneConfig, argv, "jobs.tune")
    os.environ.update(_RAY)
    from jobs.on_ray.room import require_room
    from jobs.on_ray.session import connect

    connect()
    require_room("a trial", "cpus_per_trial or gpus_per_trial", cpus=config.cpus_per_trial, gpus=config.gpus_per_trial)
    with Lease(config.runs, config.name, "tune") as lease:
        return _search(config, lease)


def _search(config: TuneConfig, lease: Lease) -> int:
    """The job, as the only one of its name."""
    api = tracking.client()
    config = pinned(config)
    run_id = tracking.open_run(api, config.experiment, config.name, "tune", params=resolved(config), tags={})
    print(
        f"search {config.name}: {config.trials} trials, {config.concurrent} at a time; MLflow run {run_id}", flush=True
    )
    began = time.monotonic()
    try:
        results = list(search(config))
        lease.check()
        trials = trials_of(config, results, numbers_of(config, results))
        for item in trials:
            through_outage(partial(_log_trial, api, config, run_id, item), f"the result of trial {item.trial}")
        result = searched(config, trials, run_id=run_id, seconds=time.monotonic() - began)
        best = json.dumps(asdict(result.best))
        through_outage(lambda: api.set_tag(run_id, "tomoscale.best", best), "what was found best")
        driver.write_result(config.runs, config.name, result.to_json())
    except BaseException as error:
        lease.check()  # the run in MLflow is another job's as well
        driver.end_failed(api, run_id, error)
        raise
    driver.end_run(api, run_id, "FINISHED")
    print(f"best: {result.choice}", flush=True)
    return 0


def search(config: TuneConfig) -> Any:
    """Run or continue the search; returns Ray Tune's result grid."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from jobs.on_ray.filesystem import storage_for
    from jobs.on_ray.patches import patch_tune_to_stop_at_final_errors

    driver.quiet()  # again, as Optuna has only now set its loggers
    patch_tune_to_stop_at_final_errors()
    path, filesystem = storage_for(config.runs)
    place = f"{path}/{config.name}"
    function = tune.with_resources(
        tune.with_parameters(trial, payload={"config": resolved(config)}),
        {"CPU": config.cpus_per_trial, "GPU": config.gpus_per_trial},
    )
    if tune.Tuner.can_restore(place, storage_filesystem=filesystem):
        # What a restored search ran at a time, and on how many CPUs, is in its state.
        print(f"continuing the search at {place}, with as many trials at a time as it began with", flush=True)
        tuner = tune.Tuner.restore(
            place, function, resume_errored=True, resume_unfinished=True, storage_filesystem=filesystem
        )
        return tuner.fit()
    space = {
        "lr": tune.loguniform(*config.space.lr),
        "encoder_lr_scale": tune.choice(list(config.space.encoder_lr_scale)),
        "encoder": tune.choice(list(config.encoders)),
    }
    tuner = tune.Tuner(
        function,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=config.trials,
            max_concurrent_trials=config.concurrent,
            search_alg=OptunaSearch(metric=METRIC, mode="max", seed=config.seed),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=config.finetune.epochs,
                grace_period=config.grace_epochs,
                reduction_factor=config.reduction,
            ),
        ),
        run_config=tune.RunConfig(
            name=config.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=2),
            verbose=0,
        ),
    )
    return tuner.fit()


def numbers_of(config: TuneConfig, results: Sequence[Any]) -> dict[str, int]:
    """The number of each trial by its id, the same at every start of the search.

    Ray Tune lists the trials of a continued search by when they last reported. The ids are therefore kept beside the
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


def trials_of(config: TuneConfig, results: Iterable[Any], numbers: Mapping[str, int]) -> tuple[Trial, ...]:
    """What each of Ray Tune's results was and came to, by number.

    Args:
        config: The search.
        results: Ray Tune's, in any order.
        numbers: From `numbers_of`.
    """
    trials = []
    for result in results:
        trial_id = result.metrics["trial_id"]
        frame = result.metrics_dataframe
        scores = _last_attempt(frame) if frame is not None and METRIC in frame else ()
        trials.append(
            Trial(
                trial=numbers[trial_id],
                settings=from_fields(TrialSettings, result.config),
                scores=scores,
                stopped_early=bool(scores) and len(scores) < config.finetune.epochs and result.error is None,
                error=None if result.error is None else last_line(result.error),
                id=trial_id,
            )
        )
    return tuple(sorted(trials, key=lambda item: item.trial))


def searched(config: TuneConfig, trials: tuple[Trial, ...], *, run_id: str, seconds: float) -> SearchResult:
    """The trials and what is chosen of them.

    Raises:
        StackError: no trial came to a result.
    """
    # Settings that have failed would fail again, however well they began.
    finished = [t for t in trials if t.scores and t.error is None]
    if not finished:
        raise StackError(
            f"search {config.name}",
            expected="at least one trial with a metric",
            found=next((t.error for t in trials if t.error), "no metric"),
            remedy="the log above names each trial's error; the same name tries the failed ones again",
        )
    # The last epoch, not the best one: a training of the same length is what will be run with these settings.
    complete = [t for t in finished if not t.stopped_early] or finished
    best = max(complete, key=lambda t: t.scores[-1])
    words = f"trial {best.trial}, lr {best.settings.lr:.2e}, encoder lr x {best.settings.encoder_lr_scale:g}"
    words += f", inner Dice {best.scores[-1]:.3f}"
    return SearchResult(trials, best.settings, words, config.finetune.epochs, run_id, seconds)


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


def _last_attempt(frame: Any) -> tuple[float, ...]:
    """The metric by epoch; a trial that began again after a death has reported its first epochs twice."""
    epochs = frame["epoch"].tolist()
    began = max(row for row, epoch in enumerate(epochs) if epoch == min(epochs))
    return tuple(float(score) for score in frame[METRIC].tolist()[began:])


def _log_trial(api: Any, config: TuneConfig, run_id: str, item: Trial) -> None:
    """A child run with the metric of each epoch."""
    if item.error:
        print(f"trial {item.trial} failed: {item.error}", flush=True)
    child = tracking.open_run(
        api,
        config.experiment,
        f"{config.name}-{item.trial}",
        "trial",
        params=asdict(item.settings),
        tags={"tomoscale.stopped_early": str(item.stopped_early), "tomoscale.trial": item.id},
        parent=run_id,
    )
    points = [tracking.point(epoch, {METRIC: score}) for epoch, score in enumerate(item.scores, 1)]
    tracking.backfill(api, child, points)
    driver.end_run(api, child, "FINISHED" if item.error is None else "FAILED")


if __name__ == "__main__":
    sys.exit(driver.guarded(main))
