"""The driver of a search: trials through Ray Tune, each a live child run in MLflow, and `result.json` in the end."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from jobs import driver
from jobs.configs import FinetuneJobConfig, registrable
from jobs.configs.search import TuneConfig
from jobs.configs.space import ENCODER, with_settings
from jobs.finetune import train_from
from jobs.finetune.checkpoints import clear_all
from jobs.ingest_config import LONGEST_NAME
from jobs.lease import Lease
from jobs.pages import search as page
from jobs.pinning import pinned
from jobs.tracking import runs as tracking
from jobs.tracking.inputs import log_inputs
from jobs.tracking.outage import through_outage
from jobs.tracking.starts import read_start
from jobs.tune import timed, warm
from jobs.tune.confirm import Pool, confirm, on_ray
from jobs.tune.journal import Entry, Journal
from jobs.tune.live import Live
from jobs.tune.outcome import searched
from jobs.tune.state import Search
from jobs.tune.suggest import Earlier, Suggestions
from ssl_core.config import dump_yaml, resolved
from ssl_core.downstream.records import from_fields
from ssl_core.downstream.search import SCHEDULE, SearchResult
from storage.format.manifest import Manifest
from storage.objects import join, open_store

REPORT, BEST = "report.html", "best.yaml"
"""Of a search, below `<runs>/<name>` and in its run in MLflow."""
_LONGEST_TAG = 5000  # letters that MLflow takes

# Ray Tune is imported in functions: it reads these from the environment, and a wrong configuration need not wait.
RAY = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 the older reporter is silent; the newer one is not
    # Ray would take Ctrl-C for the end of the search, and half of one would be reported as the whole.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # The journal is what a search goes on from: Ray's own state is written rarely and read never.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
}


def main(argv: Sequence[str]) -> int:
    """Search, log trials to MLflow as child runs, write `result.json`."""
    config = driver.load(TuneConfig, argv, "jobs.tune")
    os.environ.update(RAY)
    from jobs.on_ray.room import require_room
    from jobs.on_ray.session import connect

    connect()
    require_room("a trial", "cpus_per_trial or gpus_per_trial", cpus=config.cpus_per_trial, gpus=config.gpus_per_trial)
    with Lease(config.runs, config.name, "tune") as lease:
        run(config, lease)
    return 0


def run(
    config: TuneConfig, lease: Lease, *, train: Callable[..., Any] = train_from, pool: Pool | None = None
) -> SearchResult:
    """The job, as the only one of its name.

    Args:
        config: The search.
        lease: Held by the caller.
        train: What a trial does; see `jobs.tune.on_tune.trial`.
        pool: Where the trainings of a confirmation run; on the cluster when None.
    """
    api = tracking.client()
    config = pinned(config)
    _require_starts(config)
    concurrent = config.concurrent or room_for(config)
    run_id = tracking.open_run(api, config.experiment, config.name, "tune", params=resolved(config), tags={})
    manifest = Manifest.open(config.labelled.data, config.labelled.fingerprint)
    log_inputs(api, run_id, config.labelled.data, manifest, "training", config.encoders)
    print(f"search {config.name}: {config.total} trials, {concurrent} at a time; MLflow run {run_id}", flush=True)
    live = Live(config, run_id, tracking.client())
    try:
        search, seconds = state_of(config, concurrent, api, live)
        try:
            _run_trials(config, search, concurrent, train)
        finally:
            live.close()
        clear_all(timed.url_of(config))
        lease.check()
        trials = search.trials()
        for trial in trials:
            if trial.error:
                print(f"trial {trial.trial} failed: {trial.error}", flush=True)
        live.complete(trials)
        result = searched(config, trials, run_id=run_id, seconds=seconds())
        best = json.dumps(_short(result.best))
        through_outage(lambda: api.set_tag(run_id, "tomoscale.best", best), "what was found best")
        driver.write_result(config.runs, config.name, result.to_json())
        publish(api, config, result)
        if config.confirm is not None:
            job = best_job(config, result)
            pool = pool or on_ray(config, concurrent)
            confirmation = confirm(config, result, job, pool, api=api, check=lease.check)
            result = replace(result, confirmation=confirmation)
            driver.write_result(config.runs, config.name, result.to_json())
            publish(api, config, result)
    except BaseException as error:
        lease.check()  # the run in MLflow is another job's as well
        live.interrupted()
        driver.end_failed(api, run_id, error)
        raise
    driver.end_run(api, run_id, "FINISHED")
    print(f"best: {result.choice}", flush=True)
    if result.confirmation is not None:
        print(f"confirmed: {result.confirmation.statement}", flush=True)
        print(f"registered models:/{result.confirmation.model}/{result.confirmation.version}", flush=True)
    print(f"report: {join(config.runs, config.name, REPORT)}; to refit and register: {BEST} beside it", flush=True)
    return result


def _short(best: Mapping[str, Any]) -> dict[str, Any]:
    """The best settings, as far as a tag of MLflow holds them."""
    if len(json.dumps(best)) <= _LONGEST_TAG:
        return dict(best)
    return {**best, SCHEDULE: f"in {BEST}"}


def _require_starts(config: TuneConfig) -> None:
    """Refuse starts that lack what trials would take over or supervise, before any begins.

    Raises:
        ConfigError: names the start and the first tensor that it lacks, or how many levels there are.
    """
    transfers = config.values_of("finetune.transfer")
    levels = config.values_of("finetune.deep_supervision")
    for uri in config.encoders:
        if uri != "none":
            start = read_start(uri)
            for transfer in transfers:
                start.require_transfer(transfer)
            print(f"{uri} brings {' or '.join(dict.fromkeys(map(start.brings, transfers)))}", flush=True)
            for level in levels:
                start.require_levels(level)


def best_job(config: TuneConfig, result: SearchResult) -> FinetuneJobConfig:
    """The best settings as a fine-tuning of three seeds, which scores held-out subjects and registers a segmenter."""
    encoder = str(result.best[ENCODER])
    starts = {"best": encoder}
    if encoder == "none":  # whose network it is, a start has to say
        starts["pre-trained"] = next(uri for uri in config.encoders if uri != "none")
    name = f"{config.name[: LONGEST_NAME - 5]}-best"
    return FinetuneJobConfig(
        name=name,
        runs=config.runs,
        experiment=config.experiment,
        starts=starts,
        labelled=config.labelled,
        finetune=with_settings(config.finetune, result.best),
        cpus_per_run=config.cpus_per_trial,
        gpus_per_run=config.gpus_per_trial,
        model=None if registrable(name) else name.replace(".", "-"),
        register_start="best",
    )


def publish(api: Any, config: TuneConfig, result: SearchResult) -> None:
    """Write the report and the best configuration beside the result, and into the run in MLflow."""
    best_yaml = dump_yaml(best_job(config, result))
    price = (config.price_per_hour or 0.0) * sum(t.seconds for t in result.trials) / 3600
    facts = {"price of the trials": f"{price:.2f}"} if price else {}
    html = page.render(result, name=config.name, best_yaml=best_yaml, config_yaml=dump_yaml(config), facts=facts)
    store = open_store(join(config.runs, config.name))
    for key, text in ((BEST, best_yaml), (REPORT, html)):
        store.put(key, text.encode())
        through_outage(partial(api.log_text, result.run_id, text, key), f"{key} of the search")


def state_of(
    config: TuneConfig, concurrent: int, api: Any, live: Live | None = None
) -> tuple[Search, Callable[[], float]]:
    """The search as far as it has come, and its clock.

    Args:
        config: The search, pinned.
        concurrent: Trials at a time, now.
        api: MLflow's client.
        live: Hears what becomes of trials.
    """
    journal = Journal(config.runs, config.name)
    entries = journal.read()
    if entries:
        ended = sum(entry.has_ended for entry in entries)
        print(f"continuing the search: {ended} of {config.total} trials have ended", flush=True)
    rows = journal.once("earlier.json", lambda: [asdict(item) for item in warm.earlier_trials(config, api)])
    began, spent = time.monotonic(), journal.seconds()

    def seconds() -> float:
        return spent + time.monotonic() - began

    def keep(entry: Entry) -> None:
        journal.write(entry, seconds())
        timed.clear_needless(config, entry)

    search = Search(
        config,
        concurrent,
        Suggestions(config, [from_fields(Earlier, row) for row in rows]),
        entries=entries,
        keep=keep,
        listener=live,
        seconds=seconds,
    )
    return search, seconds


def room_for(config: TuneConfig) -> int:
    """How many trials the CPUs and GPUs of the cluster's nodes can hold at once."""
    from jobs.on_ray.room import places

    return max(1, places(cpus=config.cpus_per_trial, gpus=config.gpus_per_trial))


def _run_trials(config: TuneConfig, search: Search, concurrent: int, train: Callable[..., Any]) -> None:
    # Ray Tune would start one trial after another, however many may run.
    os.environ.update({**RAY, "TUNE_MAX_PENDING_TRIALS_PG": str(concurrent)})
    from jobs.tune import on_tune

    driver.quiet()  # again, as Ray Tune has only now set its loggers
    if not search.is_over():
        on_tune.run(config, search, start=time.strftime("%Y%m%d-%H%M%S"), train=train)
