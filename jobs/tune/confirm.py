"""The best of a search, refit on draws of labelled subjects beside a reference, scored on the test split, registered.

What is compared is kept, at `<runs>/<name>/confirm/plan.json`, before a test subject is read. Each training's result is
kept as it ends, so that a search sent again goes on with those that are missing.
"""

import json
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jobs import driver
from jobs.configs import FinetuneJobConfig
from jobs.configs.search import TuneConfig
from jobs.configs.space import ENCODER, with_settings
from jobs.finetune import score_test, train_from
from jobs.finetune.checkpoints import StoredCheckpoints, clear_all
from jobs.tracking import bundles, registration
from jobs.tracking import runs as tracking
from jobs.tracking.outage import through_outage
from jobs.tune.outcome import best_of
from ssl_core.bundle_card import amend
from ssl_core.config import digested, parse, resolved
from ssl_core.downstream.comparison import Training, subject_dice
from ssl_core.downstream.confirmation import Confirmation, Scored, confirmed
from ssl_core.downstream.scores import METRICS, mean_scores
from ssl_core.downstream.search import SearchResult, trained_with
from storage.errors import ConfigError
from storage.objects import join, open_store

FOLDER, PLAN = "confirm", "plan.json"
BEST, REFERENCE = "best", "reference"
_FREE = {"model": None}  # the name of what is registered may change
SCRATCH, STARTS, PLAIN = "random weights", "the pre-trained start", "the same start with the settings as they were"


@dataclass(frozen=True)
class Work:
    """One training.

    Attributes:
        side: `best` or `reference`.
        draw: Seed of the draw of labelled subjects.
        seed: Of weights, crops and augmentations.
        job: The fine-tuning as a job of its own, resolved.
        keep: Whether its segmenter is the one to register; fixed before any score.
        url: Of the confirmation.
        run_id: MLflow run of the search.
    """

    side: str
    draw: int
    seed: int
    job: dict[str, Any]
    keep: bool
    url: str
    run_id: str

    @property
    def key(self) -> str:
        """Of its result."""
        return f"trainings/{self.side}-{self.draw}-{self.seed}.json"

    @property
    def checkpoints(self) -> StoredCheckpoints:
        """Where it goes on after a death."""
        return StoredCheckpoints(join(self.url, "checkpoints", f"{self.side}-{self.draw}-{self.seed}"))


Pool = Callable[[Sequence[Work]], Generator[tuple[Work, Training], None, None]]
"""Does trainings somewhere and gives each as it ends, in any order."""


def train(work: Work) -> Training:
    """Train, score every test case, and store the segmenter where it is the one to register."""
    config = parse(FinetuneJobConfig, work.job)
    began = time.monotonic()
    start = config.starts[work.side]
    trained = train_from(
        start,
        config.labelled,
        config.finetune,
        seed=work.seed,
        like=next(uri for uri in config.starts.values() if uri != "none"),
        gpu=config.gpus_per_run > 0,
        checkpoints=work.checkpoints,
    )
    with trained.store:
        cases = score_test(trained, config.labelled, config.finetune, config.nsd_tolerance_mm)
        if work.keep:
            with tempfile.TemporaryDirectory(prefix="tomoscale-bundle-") as folder:
                target = Path(folder) / "bundle"
                bundle = bundles.write_segmenter(config, trained, target, run_id=work.run_id, cases=cases, parent=start)
                registration.store_bundle(bundle, work.url)
    return Training(work.side, work.seed, trained.history, cases, None, time.monotonic() - began)


def on_ray(config: TuneConfig, concurrent: int) -> Pool:
    """Tasks of the cluster that this driver has joined; one whose worker died is tried again."""

    def pool(todo: Sequence[Work]) -> Generator[tuple[Work, Training], None, None]:
        import ray  # late: a wrong configuration need not wait for it

        from jobs.on_ray.session import result_of

        task = ray.remote(num_cpus=config.cpus_per_trial, num_gpus=config.gpus_per_trial, max_retries=2)(train)
        waiting, running = list(todo), dict[Any, Work]()
        try:
            while waiting or running:
                while waiting and len(running) < concurrent:
                    work = waiting.pop(0)
                    running[task.remote(work)] = work
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                yield running.pop(done), result_of(done)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    return pool


def confirm(
    config: TuneConfig, result: SearchResult, job: FinetuneJobConfig, pool: Pool, *, api: Any, check: Callable[[], None]
) -> Confirmation:
    """Refit, compare, register.

    Args:
        config: The search, pinned, with `confirm`.
        result: What came of it.
        job: A fine-tuning of the best settings; see `jobs.tune.driver.best_job`.
        pool: Where trainings run.
        api: MLflow's client.
        check: Raises where this driver has to stop.

    Raises:
        ConfigError: another confirmation of this search has begun.
        StackError: the segmenter could not be registered.
    """
    assert config.confirm is not None
    url = join(config.runs, config.name, FOLDER)
    store = open_store(url)
    sides = {BEST: (_name_of(result), dict(result.best), _size(result, result.best_trial))}
    sides[REFERENCE] = _reference(result)
    draws = tuple(config.labelled.draws[0] + 1 + i for i in range(config.confirm.draws))
    _seal(store, {"sides": sides, "draws": draws, "confirm": digested(config.confirm.model_copy(update=_FREE))})
    todo: list[Work] = []
    done: dict[tuple[str, int, int], Training] = {}
    for place, draw in enumerate(draws):
        for seed in range(place * config.confirm.seeds, (place + 1) * config.confirm.seeds):
            for side, (_, settings, _) in sides.items():
                keep = side == BEST and place == 0 and seed == 0
                own = _job(config, job, side, settings, draw)
                work = Work(side, draw, seed, resolved(own), keep, url, result.run_id)
                if store.exists(work.key):
                    done[side, draw, seed] = Training.from_json(json.loads(store.get(work.key)))
                else:
                    todo.append(work)
    whole = len(todo) + len(done)
    print(f"confirming the best on {len(draws)} draws: {len(todo)} of {whole} trainings to do", flush=True)
    with closing(pool(todo)) as trainings:
        for work, training in trainings:
            check()
            through_outage(partial(_log, api, config, result.run_id, work, training), f"the result of {work.key}")
            store.put(work.key, json.dumps(training.to_json()).encode())
            work.checkpoints.clear()
            done[work.side, work.draw, work.seed] = training
            dice = mean_scores(training.cases).dice
            print(
                f"{work.side} draw {work.draw} seed {work.seed}: test Dice {dice:.3f} ({len(done)}/{whole})", flush=True
            )
    clear_all(join(url, "checkpoints"))
    best, reference = (Scored(*sides[side], _dice(done, side, draws)) for side in (BEST, REFERENCE))
    outcome = partial(
        confirmed,
        best,
        reference,
        labels=config.labelled.subjects - config.labelled.inner,
        draws=draws,
        seeds=config.confirm.seeds,
        model=config.confirm.model or config.name,
    )
    return outcome(version=_registered(config, outcome(version=""), url, result.run_id))


def _name_of(result: SearchResult) -> str:
    return SCRATCH if result.best[ENCODER] == "none" else STARTS


def _size(result: SearchResult, number: int) -> int:
    """Trials of the search that a trial is the best of."""
    arms = {trial.trial: trial.arm for trial in result.trials}
    return sum(arm == arms[number] for arm in arms.values())


def _reference(result: SearchResult) -> tuple[str, dict[str, Any], int]:
    """The best of the other arm, which had as many trials; without one the best's start with nothing searched."""
    arm = next(trial.arm for trial in result.trials if trial.trial == result.best_trial)
    other = best_of([trial for trial in result.trials if trial.arm != arm])
    if other is None:
        return PLAIN, {ENCODER: result.best[ENCODER]}, 0
    name = SCRATCH if other.encoder == "none" else STARTS
    return name, trained_with(result.trials, other.trial, result.epochs), _size(result, other.trial)


def _seal(store: Any, plan: Mapping[str, Any]) -> None:
    """Keep what will be compared; what the first start kept stays.

    Raises:
        ConfigError: it was something else: draws may not be added until a difference shows.
    """
    content = json.dumps(plan, sort_keys=True).encode()
    if not store.put(PLAN, content, if_absent=True) and (before := store.get(PLAN)) != content:
        first = json.loads(before)
        raise ConfigError(
            "confirm",
            expected=f"the confirmation that this search began, kept at {store.url}/{PLAN}: {first['confirm']}",
            found=f"another: {json.loads(content)['confirm']}",
            remedy="leave it as it was: draws that are added once scores are there make chance look like a gain",
        )


def _job(
    config: TuneConfig, job: FinetuneJobConfig, side: str, settings: Mapping[str, Any], draw: int
) -> FinetuneJobConfig:
    """The fine-tuning of one side on one draw."""
    assert config.confirm is not None
    encoder = str(settings[ENCODER])
    starts = {side: encoder}
    if encoder == "none":  # whose network it is, a start has to say
        starts["like"] = next(uri for uri in config.encoders if uri != "none")
    changes = {
        "starts": starts,
        "register_start": side,
        "labelled": config.labelled.model_copy(update={"subjects_seed": draw}),
        "finetune": with_settings(config.finetune, settings),
        "model": config.confirm.model or config.name,
        "nsd_tolerance_mm": config.confirm.nsd_tolerance_mm,
    }
    return job.model_copy(update=changes)


def _dice(done: Mapping[tuple[str, int, int], Training], side: str, draws: Sequence[int]) -> Any:
    """Dice by draw and test subject, over the trainings of each draw."""
    rows = []
    for draw in draws:
        trainings = [training for (s, d, _), training in sorted(done.items()) if (s, d) == (side, draw)]
        rows.append(list(subject_dice(trainings, side).values()))
    return np.array(rows, np.float64)


def _registered(config: TuneConfig, outcome: Confirmation, url: str, run_id: str) -> str:
    """Register the segmenter of the first draw, whose card says what came of all; returns the version."""

    def with_outcome(bundle: Path) -> None:
        amend(bundle, f"Confirmed over {len(outcome.draws)} draws", outcome.statement, outcome.metrics)

    command = "`tomoscale tune CONFIG`, with confirm.model=NAME for another name,"
    version = registration.register_stored(url, outcome.model, run_id=run_id, command=command, change=with_outcome)
    tags = {
        "statement": outcome.statement,
        "mean": f"{outcome.best.mean:.6f}",
        "sd": f"{outcome.best.sd:.6f}",
        "draws": str(len(outcome.draws)),
        "reference": outcome.reference.name,
        "difference": f"{outcome.test.difference:.6f}",
        "p": f"{outcome.test.p:.6g}",
    }

    def tag() -> None:
        api = tracking.client()
        for key, value in tags.items():
            api.set_model_version_tag(outcome.model, version, f"tomoscale.confirmed.{key}", value)

    through_outage(tag, "what was confirmed")
    return version


def _log(api: Any, config: TuneConfig, run_id: str, work: Work, training: Training) -> None:
    """A child run: the metrics of each epoch, then the mean of each score over the test cases."""
    child = tracking.open_run(
        api,
        config.experiment,
        f"{config.name}-{work.side}-{work.draw}-{work.seed}",
        "confirmation",
        params={"side": work.side, "subjects_seed": work.draw, "seed": work.seed, "job": work.job["finetune"]},
        tags={},
        parent=run_id,
    )
    points = [tracking.point(epoch, metrics) for epoch, metrics in enumerate(training.history, 1)]
    means = mean_scores(training.cases)
    points.append(tracking.point(len(points) + 1, {f"test/{metric.name}": means.of(metric) for metric in METRICS}))
    tracking.backfill(api, child, points)
    driver.end_run(api, child, "FINISHED")
