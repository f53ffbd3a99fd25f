"""Pre-training as a Ray job: `python -m jobs.pretrain CONFIG [key=value ...]`.

The same name continues the same job after any death: of a worker (Ray Train restarts the group from the last
checkpoint), of the driver (submit again) or of the store (writes are retried for minutes, and the controller is started
again).
"""

import math
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from jobs.certificate import document, signing
from jobs.configs import PretrainConfig
from jobs.driver import end_failed, end_run, load
from jobs.ingest import over_tasks
from jobs.ingestion import ensure_data
from jobs.lease import Lease
from jobs.on_ray.failures import FINAL, StopOnFinalErrors
from jobs.on_ray.filesystem import storage_for
from jobs.on_ray.patches import patch_ray_to_share_evenly
from jobs.on_ray.restarts import NoteRestarts
from jobs.on_ray.room import require_room
from jobs.on_ray.session import connect
from jobs.output import last_line
from jobs.pinning import as_started, note_start, with_fixed_init
from jobs.pretrain.inputs import open_manifest
from jobs.pretrain.loop import JOURNAL, KIND, collectives_backend
from jobs.pretrain.worker import UNMEASURED, train_loop
from jobs.superpixels import ensure_superpixels
from jobs.tracking import bundles, registration, runs
from jobs.tracking.events import Events
from jobs.tracking.inputs import log_inputs
from jobs.tracking.outage import through_outage
from jobs.watch.causes import cause_of, cause_of_workers
from ssl_core.config import resolved
from ssl_core.train import checkpoint
from ssl_core.train.chain import weights_digest
from storage.errors import StackError, TomoscaleError
from storage.objects import join, open_store
from storage.objects.retry import OutOfTime, RetryPolicy, repeat

# Counted and not timed, since between two failures lie hours of training.
_CONTROLLER = RetryPolicy(deadline_s=math.inf, attempt_s=0.0, first_s=10.0, cap_s=80.0, tries=5)


def main(argv: Sequence[str]) -> int:
    """Driver: data, run, training, registration."""
    config = load(PretrainConfig, argv, "jobs.pretrain")
    signing.own_key()  # a wrong file is told now, and not after the last step

    connect()
    need = config.cluster
    require_room(
        "a training worker",
        "cluster.workers, cluster.cpus_per_worker or cluster.gpu",
        cpus=need.cpus_per_worker,
        gpus=int(need.gpu),
        count=need.min_workers or need.workers,
    )
    with Lease(config.runs, config.name, KIND) as lease:
        return _train(config, lease)


def _train(config: PretrainConfig, lease: Lease) -> int:
    """The job, as the only one of its name."""
    api = runs.client()
    ensure_data(config.data, config.source, over_tasks)

    config = as_started(config)
    ensure_superpixels(config)
    manifest = open_manifest(config)
    note_start(config, manifest)
    config = with_fixed_init(config)
    run_id = runs.open_run(
        api,
        config.experiment,
        config.name,
        "pretrain",
        params=resolved(config),
        tags={"tomoscale.data": config.data, "tomoscale.fingerprint": manifest.fingerprint},
    )
    starts = () if config.init is None else (config.init,)
    log_inputs(api, run_id, config.data, manifest, "training", starts)
    if runs.SENTINEL in api.get_run(run_id).data.metrics:
        Events(run_id).tell("the job was sent again")
    pinned = config.model_copy(update={"fingerprint": manifest.fingerprint})
    used = f"{len(manifest.select(split=config.stream.split))} of {len(manifest)} volumes (split {config.stream.split})"
    print(f"pre-training {config.name}: {config.method_name} on {used} of {config.data}", flush=True)
    print(f"MLflow run {run_id}", flush=True)
    began = time.monotonic()
    try:
        result = fit(pinned, run_id, lease.token)
        lease.check()
        with ExitStack() as open_folders:
            last = Path(open_folders.enter_context(result.checkpoint.as_directory()))
            best = best_checkpoint(config, result)
            source = last if best is None else Path(open_folders.enter_context(best.as_directory()))
            version = _complete(api, pinned, run_id, last, source)
    except BaseException as error:
        lease.check()  # the run in MLflow is another job's as well
        end_failed(api, run_id, error)
        raise
    end_run(api, run_id, "FINISHED")
    print(
        f"registered models:/{pinned.model_name}/{version} @candidate after {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return 0


def fit(config: PretrainConfig, run_id: str, lease: str) -> Any:
    """Train with Ray Train until done; returns its result.

    A controller that dies of its storage is started again under the same name, with growing pauses. After a notice that
    a node will be taken away, training goes on from a checkpoint of that step, on other nodes.

    Args:
        config: The job.
        run_id: Its MLflow run.
        lease: Token of its lease, without which no checkpoint is written.

    Raises:
        TomoscaleError: training failed for good: the error of a worker that another try would meet again, or a
            StackError that carries the last line of the cause.
    """

    events = Events(run_id)
    patch_ray_to_share_evenly(config.worlds)
    path, filesystem = storage_for(config.runs)
    need, retention = config.cluster, config.checkpoints
    # Typed for the first kind only; Ray hands the others on as they are.
    callbacks: Any = [StopOnFinalErrors(), NoteRestarts(config.name, events.tell)]
    workers: Any = need.workers if need.min_workers is None else (need.min_workers, need.workers)

    def trainer() -> TorchTrainer:
        return TorchTrainer(
            train_loop,
            train_loop_config={"config": resolved(config), "run_id": run_id, "lease": lease},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=need.gpu,
                resources_per_worker={"CPU": need.cpus_per_worker, **({"GPU": 1} if need.gpu else {})},
                placement_strategy=need.placement,
                label_selector=dict(need.labels) or None,
            ),
            torch_config=TorchConfig(backend=collectives_backend(gpu=need.gpu)),
            run_config=RunConfig(
                name=config.name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=need.max_failures),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=retention.keep,
                    checkpoint_score_attribute=retention.best_by,
                    checkpoint_score_order=retention.best_is,
                ),
                logging_config=LoggingConfig(log_level="WARNING"),
                callbacks=callbacks,
            ),
        )

    while True:
        result = _result(config, trainer, events)
        step = int((result.metrics or {}).get("step", config.engine.steps))
        if step >= config.engine.steps:
            return result
        print(f"saved at step {step}, as a node will be taken away; going on on the others", flush=True)
        events.tell("a node will be taken away, and the job goes on on the others", step)


def best_checkpoint(config: PretrainConfig, result: Any) -> Any:
    """Of those that stayed, the checkpoint whose encoder is to be registered; None where it is the last one."""
    retention = config.checkpoints
    if not retention.register_best:
        return None
    key = str(retention.best_by)
    scored = [(c, m) for c, m in result.best_checkpoints or () if abs(m.get(key, UNMEASURED)) < UNMEASURED]
    if not scored:
        print(f"no checkpoint has {key}; registering the last one", flush=True)
        return None
    sign = 1 if retention.best_is == "max" else -1
    best, metrics = max(scored, key=lambda item: (sign * item[1][key], item[1]["step"]))
    print(f"registering step {metrics['step']}, whose {key} of {metrics[key]:.6g} is the best", flush=True)
    return best


def _result(config: PretrainConfig, trainer: Callable[[], TorchTrainer], events: Events) -> Any:
    """What training ended with: after its last step, or early where a node is about to be taken away."""

    def note(error: Exception, _spent_s: float) -> None:
        print(f"the training controller failed ({last_line(error)}); starting another", flush=True)
        events.tell(f"the training controller failed: {cause_of(error)}")

    try:
        return repeat(lambda: _fitted(trainer()), _CONTROLLER, _is_passing, note)
    except OutOfTime as end:
        raise StackError(
            f"pre-training {config.name}",
            expected=f"a working store at {config.runs}",
            found=f"{end.tries} failures of the controller, the last: {last_line(end.last)}",
            remedy="submit again under the same name when the store is back",
        ) from end.last
    except ControllerError as error:
        cause = error.controller_failure
        if isinstance(cause, TomoscaleError):
            raise cause from error
        raise _ended(config, cause_of(cause)) from error
    except TrainingFailedError as error:
        raise _ended(config, _of_workers(error)) from error


def _of_workers(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None)
    return cause_of_workers(failures) if failures else cause_of(error)


def _is_passing(error: Exception) -> bool:
    """Whether a controller died of its storage, and not of an error that another try would meet again."""
    return isinstance(error, ControllerError) and not isinstance(error.controller_failure, (TomoscaleError, *FINAL))


def _fitted(trainer: Any) -> Any:
    """What `trainer.fit()` returns; Ctrl-C, where Ray Train calls `sys.exit`, is a KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:
            raise
        raise KeyboardInterrupt from ended
    finally:
        signal.signal(signal.SIGINT, before)  # Ray's asks a controller that is gone


def _complete(api: Any, config: PretrainConfig, run_id: str, last: Path, source: Path) -> str:
    """Fill gaps in the metrics from the last checkpoint, export the encoder of one and register it."""

    meta = checkpoint.read_meta(last)
    journal = [runs.Point.from_json(item) for item in meta[JOURNAL]]
    points = f"the points of {config.name}, which is trained and lies below {join(config.runs, config.name)}"
    sent = through_outage(lambda: runs.backfill(api, run_id, journal), points)
    if sent:
        print(f"sent {sent} points that MLflow had missed", flush=True)
    through_outage(lambda: api.set_tag(run_id, "tomoscale.samples", meta["samples"]), points)
    with tempfile.TemporaryDirectory(prefix="tomoscale-bundle-") as folder:
        bundle = bundles.write_encoder(config, source, Path(folder) / "bundle", run_id=run_id)
        command = f"`tomoscale pretrain CONFIG`, with model=NAME for another name than {config.model_name!r},"
        place = join(config.runs, config.name)
        version = registration.register(bundle, config.model_name, run_id=run_id, place=place, command=command)
        model = document.Model(config.model_name, version, weights_digest(bundles.read_encoder(bundle).weights))
    certificate = document.issue_from(
        open_store(place), last, config.name, resolved(config), model=model, run_id=run_id
    )
    if certificate is not None:
        through_outage(lambda: api.log_dict(run_id, certificate, document.KEY), points)
    return version


def _ended(config: PretrainConfig, reason: str) -> StackError:
    return StackError(
        f"pre-training {config.name}",
        expected="all steps",
        found=reason,
        remedy="the cause is in the log above; the same name goes on from the last checkpoint",
    )
