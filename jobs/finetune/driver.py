"""The driver of a fine-tuning job.

Each start with each seed on each draw of labelled subjects is one task, which goes on from its last checkpoint where it
died. Every test case is scored,
every training is a child run in MLflow, and one segmenter, chosen before any test score exists, is registered. Each
training's result is kept as it ends, so the same name goes on with those that are missing.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from numpy.typing import NDArray

from jobs import driver
from jobs import labelled as split
from jobs.configs import FinetuneJobConfig
from jobs.finetune import heads, previews
from jobs.finetune.checkpoints import StoredCheckpoints
from jobs.finetune.training import score_test, train_from
from jobs.lease import Lease
from jobs.pinning import pinned
from jobs.tracking import bundles, registration
from jobs.tracking import models as registry
from jobs.tracking import runs as tracking
from jobs.tracking.inputs import log_inputs
from jobs.tracking.outage import through_outage
from jobs.tracking.starts import read_start
from ssl_core.config import parse, resolved
from ssl_core.downstream.comparison import Comparison, Training, paired_test_of, start_rows
from ssl_core.downstream.finetune import TrainedSegmenter
from ssl_core.downstream.heads.comparison import HeadComparison, HeadTraining
from ssl_core.downstream.scores import CaseScore, CaseSlice
from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.objects import join, open_store

T = TypeVar("T", Training, HeadTraining)


@dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
        start: Name of its start.
        seed: Its seed.
        draw: Seed of its draw of labelled subjects; None where the job has one draw.
    """

    start: str
    seed: int
    draw: int | None

    @property
    def key(self) -> str:
        """Of its result, and of its checkpoints without the ending."""
        return f"{quote(self.start, safe='')}-{self.seed}{'' if self.draw is None else f'-draw-{self.draw}'}.json"

    def __str__(self) -> str:
        """For a person."""
        return f"{self.start} seed {self.seed}{'' if self.draw is None else f' draw {self.draw}'}"


def tasks(config: FinetuneJobConfig) -> list[Task]:
    """All trainings of a job: starts turn by turn, so that what is done first can be compared first."""
    draws = config.labelled.draws
    several = draws if len(draws) > 1 else (None,)
    return [Task(start, seed, draw) for draw in several for seed in config.seeds for start in config.starts]


def training_task(settings: dict[str, Any], run_id: str, task: Task) -> Training | HeadTraining:
    """Train from a start with a seed, score every test case, and store the model when it is the one to register.

    Args:
        settings: The job's configuration, resolved.
        run_id: MLflow run of the job.
        task: Which one.
    """
    config = parse(FinetuneJobConfig, settings)
    if config.finetune.task != "segmentation":
        which = heads.Which(task.start, task.seed, task.draw, task == registered_task(config))
        return heads.trained_and_stored(config, run_id, which, _checkpoints(config, task))
    began = time.monotonic()
    start, seed = task.start, task.seed
    trained = train_from(
        config.starts[start],
        config.labelled if task.draw is None else config.labelled.of_draw(task.draw),
        config.finetune,
        seed=seed,
        like=next(uri for uri in config.starts.values() if uri != "none"),
        gpu=config.gpus_per_run > 0,
        checkpoints=_checkpoints(config, task),
    )
    slices: dict[str, CaseSlice] = {}

    def keep(volume_id: str, mask_DHW: NDArray[Any], truth_DHW: NDArray[Any]) -> None:
        slices[volume_id] = CaseSlice.largest(mask_DHW, truth_DHW)

    with trained.store:
        cases = score_test(trained, config.labelled, config.finetune, config.nsd_tolerance_mm, keep)
        if task == registered_task(config):
            picture = previews.examples(trained, config.labelled.label, cases, slices)
            if picture is not None:
                open_store(join(config.runs, config.name)).put(previews.EXAMPLES, picture)
            _store(config, trained, cases, run_id=run_id, parent=config.starts[start])
    return Training(start, seed, trained.history, cases, None, time.monotonic() - began, task.draw)


def registered_start(config: FinetuneJobConfig) -> str:
    """The start whose first seed is registered: fixed by the configuration, never by a test score."""
    return config.register_start or next(iter(config.starts))


def registered_task(config: FinetuneJobConfig) -> Task:
    """The training whose segmenter is registered: the first seed of the first draw of that start."""
    return next(task for task in tasks(config) if task.start == registered_start(config))


def main(argv: Sequence[str]) -> int:
    """Driver: all starts and seeds, statistics, MLflow, `result.json`."""
    config = driver.load(FinetuneJobConfig, argv, "jobs.finetune")
    # Late: a wrong configuration need not wait for Ray, which reads settings from the environment when it is imported.
    from jobs.on_ray.room import require_room
    from jobs.on_ray.session import connect

    connect()
    require_room("a training", "cpus_per_run or gpus_per_run", cpus=config.cpus_per_run, gpus=config.gpus_per_run)
    with Lease(config.runs, config.name, "finetune") as lease:
        return _compare(config, lease)


def _compare(config: FinetuneJobConfig, lease: Lease) -> int:
    """The job, as the only one of its name."""
    import ray  # late, as in `main`

    from jobs.on_ray.session import result_of

    api = tracking.client()
    config = pinned(config)
    for uri in dict.fromkeys(config.starts.values()):
        if uri != "none":
            start = read_start(uri)
            start.require_transfer(config.finetune.transfer)
            start.require_levels(config.finetune.deep_supervision)
            if config.finetune.task == "segmentation":
                print(f"{uri} brings {start.brings(config.finetune.transfer)}", flush=True)
            else:
                start.require_pooled(config.finetune.head.levels)
    manifest = Manifest.open(config.labelled.data, config.labelled.fingerprint)
    for line in _notes(config, manifest):
        print(f"note: {line}", flush=True)
    run_id = tracking.open_run(api, config.experiment, config.name, "finetune", params=resolved(config), tags={})
    log_inputs(api, run_id, config.labelled.data, manifest, "training", config.starts.values())
    results = open_store(join(config.runs, config.name, "trainings"))
    task = ray.remote(num_cpus=config.cpus_per_run, num_gpus=config.gpus_per_run, max_retries=2)(training_task)
    running: list[Any] = []
    began = time.monotonic()
    try:
        every = tasks(config)
        keys = [each.key for each in every if results.exists(each.key)]
        read = Training.from_json if config.finetune.task == "segmentation" else HeadTraining.from_json
        trainings: list[Any] = [read(json.loads(results.get(key))) for key in keys]
        todo = [each for each in every if each.key not in keys]
        if trainings:
            print(f"{len(trainings)} of {len(every)} trainings were done before", flush=True)
        print(
            f"fine-tuning {config.name}: {len(todo)} trainings, {config.concurrent} at a time; MLflow run {run_id}",
            flush=True,
        )
        while todo or running:
            while todo and len(running) < config.concurrent:
                running.append(task.remote(resolved(config), run_id, todo.pop(0)))
            done, running = ray.wait(running, num_returns=1)
            training: Training | HeadTraining = result_of(done[0])
            lease.check()
            ended = Task(training.start, training.seed, training.draw)
            through_outage(partial(_log_training, api, config, run_id, training), f"the result of {ended}")
            results.put(ended.key, json.dumps(training.to_json()).encode())
            _checkpoints(config, ended).clear()
            trainings.append(training)
            text = f"{ended}: {training.headline}, {training.seconds:.0f} s"
            print(f"{text} ({len(trainings)}/{len(every)})", flush=True)
        trainings = _registered(config, trainings, run_id)
        comparison = _comparison(config, trainings, run_id, time.monotonic() - began)
        driver.write_result(config.runs, config.name, comparison.to_json())
        if config.finetune.task == "segmentation":
            own = open_store(join(config.runs, config.name))
            through_outage(partial(previews.log, api, run_id, own, trainings), "pictures of the test cases")
    except BaseException as error:
        lease.check()  # the run in MLflow is another job's as well
        driver.end_failed(api, run_id, error)
        raise
    driver.end_run(api, run_id, "FINISHED")
    print(comparison.statement, flush=True)
    return 0


def _notes(config: FinetuneJobConfig, manifest: Manifest) -> list[str]:
    """What the draws do not show, and what is left out of them."""
    labelled = config.labelled
    if config.finetune.task != "segmentation":
        return split.target_notes(manifest, labelled, config.finetune.task)
    return [
        f"{line}{'' if len(labelled.draws) == 1 else f' (draw {seed})'}"
        for seed, subjects in split.draws(manifest, labelled).items()
        for line in split.absent_classes(manifest, labelled.label, subjects)
    ]


def _comparison(
    config: FinetuneJobConfig, trainings: Sequence[Any], run_id: str, seconds: float
) -> Comparison | HeadComparison:
    if config.finetune.task == "segmentation":
        return compared(config, trainings, run_id=run_id, seconds=seconds)
    first = registered_start(config)
    return heads.compared_heads(config, trainings, registered=first, run_id=run_id, seconds=seconds)


def compared(config: FinetuneJobConfig, trainings: Sequence[Training], *, run_id: str, seconds: float) -> Comparison:
    """What all trainings of a job come to.

    Args:
        config: The job.
        trainings: One for each start, seed and draw, in any order.
        run_id: MLflow run of the job.
        seconds: Wall time of the job.
    """
    starts = list(config.starts)
    # As configured, not as they happened to end.
    draws = [None, *config.labelled.draws]
    in_order = sorted(trainings, key=lambda t: (starts.index(t.start), draws.index(t.draw), config.seeds.index(t.seed)))
    return Comparison(
        rows=start_rows(in_order, starts),
        trainings=tuple(in_order),
        test=paired_test_of(in_order, starts, config.labelled.subjects),
        model=config.model or config.name,
        version=next((t.version for t in in_order if t.version is not None), None),
        registered_start=registered_start(config),
        nsd_tolerance_mm=config.nsd_tolerance_mm,
        run_id=run_id,
        seconds=seconds,
    )


def _checkpoints(config: FinetuneJobConfig, task: Task) -> StoredCheckpoints:
    name = task.key.removesuffix(".json")
    return StoredCheckpoints(join(config.runs, config.name, "checkpoints", name))


def _store(
    config: FinetuneJobConfig, trained: TrainedSegmenter, cases: Sequence[CaseScore], *, run_id: str, parent: str
) -> None:
    """Before the training's result, so that whoever finds the result finds the segmenter."""
    with tempfile.TemporaryDirectory(prefix="tomoscale-bundle-") as folder:
        target = Path(folder) / "bundle"
        bundle = bundles.write_segmenter(config, trained, target, run_id=run_id, cases=cases, parent=parent)
        registration.store_bundle(bundle, join(config.runs, config.name))


def _registered(config: FinetuneJobConfig, trainings: Sequence[T], run_id: str) -> list[T]:
    """The trainings, the one whose segmenter is registered with its version.

    A job that began before segmenters were stored has registered its own when it was trained.

    Raises:
        ConfigError: it did so under another name.
        StackError: the segmenter could not be registered.
    """
    url, name = join(config.runs, config.name), config.model or config.name
    if not registration.is_stored(url):
        for training in trainings:
            if training.version and registry.resolve(f"models:/{name}/{training.version}").run_id != run_id:
                raise ConfigError(
                    f"model {name!r} of job {config.name!r}",
                    expected="the name that its segmenter was registered under",
                    found="another, and a segmenter that an earlier version of tomoscale did not store",
                    remedy="leave the name as it was, or run the job under another name",
                )
        return list(trainings)
    command = f"`tomoscale finetune CONFIG`, with model=NAME for another name than {name!r},"
    version = registration.register_stored(url, name, run_id=run_id, command=command)
    which = registered_task(config)
    return [replace(t, version=version if Task(t.start, t.seed, t.draw) == which else None) for t in trainings]


def _log_training(api: Any, config: FinetuneJobConfig, run_id: str, training: Training | HeadTraining) -> None:
    """A child run: the metrics of each epoch, then the mean of each score over the test cases."""
    child = tracking.open_run(
        api,
        config.experiment,
        f"{config.name}-{training.start}-{training.seed}{'' if training.draw is None else f'-draw-{training.draw}'}",
        "finetune-seed",
        params={"start": config.starts[training.start], "seed": training.seed}
        | ({} if training.draw is None else {"subjects_seed": training.draw}),
        tags={},
        parent=run_id,
    )
    points = [tracking.point(epoch, metrics) for epoch, metrics in enumerate(training.history, 1)]
    scores = {f"test/{name}": value for name, value in training.scores.items() if value is not None}
    points.append(tracking.point(len(points) + 1, scores))
    tracking.backfill(api, child, points)
    driver.end_run(api, child, "FINISHED")
