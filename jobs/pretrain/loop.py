"""The pre-training loop of one rank, the same under Ray Train, under `torchrun` and in a test.

It knows streams, methods and the engine; who starts the ranks, where a checkpoint goes and who hears of metrics is
handed in.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs import driver
from jobs.certificate.captures import Captures
from jobs.configs import PretrainConfig
from jobs.pinning import SETTINGS, identity, require_same
from jobs.pretrain.evidence import Evidence
from jobs.pretrain.inputs import open_manifest, stream_spec, view_spec
from jobs.pretrain.label_probe import LabelProbe
from jobs.tracking.bundles import EncoderBundle, pull_encoder
from jobs.tracking.runs import Point, point
from jobs.watch.progress import Pace, Progress
from ssl_core.config import resolved
from ssl_core.distributed import Collectives, current
from ssl_core.methods.base import method_class
from ssl_core.networks.recompute import has_batch_norm
from ssl_core.networks.registry import build
from ssl_core.networks.weights import load_exact
from ssl_core.train import checkpoint
from ssl_core.train.checkpoint import Buffers, Snapshot
from ssl_core.train.engine import Engine
from ssl_core.train.loop import fit
from ssl_core.views.make import make_views
from ssl_core.views.types import ViewBatch
from storage.errors import ConfigError
from storage.objects import ByteStore, open_store
from storage.reading.node_cache import NodeCache
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream, HostBatch
from storage.stream.plan import order_digest

KIND = "pretrain"
"""Of the job, in MLflow and in the name of its lease."""
JOURNAL = "journal"
"""Of a checkpoint: the points that are nowhere else yet, and the last one."""
Take = Callable[[], Snapshot]


@dataclass
class SampleRecord:
    """A digest of every sample consumed so far, in global order: index, volume, place and voxels.

    Equal digests mean that two runs have learned from the same voxels in the same order, whatever the number of ranks.
    """

    value: str = hashlib.sha256(b"tomoscale").hexdigest()

    def add(self, batch: HostBatch, collectives: Collectives) -> None:
        """Extend by one global batch; a collective call."""
        local = np.empty((len(batch.sample_B), 6), dtype=np.int64)
        local[:, 0], local[:, 1], local[:, 2:5] = batch.sample_B, batch.volume_B, batch.start_B3
        local[:, 5] = [zlib.crc32(np.ascontiguousarray(crop).data) for crop in batch.image_BCDHW]
        rows = collectives.gather(torch.from_numpy(local)).numpy()
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        self.value = hashlib.sha256(self.value.encode() + rows.astype("<i8").tobytes()).hexdigest()


@dataclass
class Hooks:
    """What the surroundings of a loop provide.

    Attributes:
        publish: Called on every rank with the steps done, what takes the checkpoint (rank 0 only) and the metrics. The
            state is live until it is taken, which is to be done before returning; writing what was taken may wait, but
            not beyond the next taking, which uses its memory.
        on_point: Called on rank 0 with each new point.
        is_recorded: Whether the point of a step is where it stays; checkpoints carry all others.
        say: Called on rank 0 with a line for the log.
        stop: Asked before each step.
        on_report: Called on every rank with the steps done, the metrics and the tallies of the store that it reads.
        on_batch: Called on every rank with each batch as it comes from the stream.
        open_store: Opens the store of volumes.
        captures: Where steps with a bad loss go.
    """

    publish: Callable[[int, Take | None, dict[str, float]], None]
    on_point: Callable[[Point], None] = lambda _point: None
    is_recorded: Callable[[int], bool] = lambda _step: False
    say: Callable[[str], None] = lambda _line: None
    stop: Callable[[], bool] | None = None
    on_report: Callable[[int, dict[str, float], dict[str, int]], None] = lambda _step, _metrics, _tallies: None
    on_batch: Callable[[HostBatch], None] = lambda _batch: None
    open_store: Callable[[str], ByteStore] = open_store
    captures: Captures | None = None
    last: dict[str, float] = field(default_factory=dict)


def collectives_backend(*, gpu: bool) -> str:
    """What `torch.distributed` is to use: NCCL for tensors on GPUs, and gloo for those of the host, which NCCL refuses.

    `SampleRecord` gathers host tensors, so that no rank waits for its GPU to say what it has read.
    """
    return "cpu:gloo,cuda:nccl" if gpu else "gloo"


def build_engine(
    config: PretrainConfig,
    device: torch.device,
    init: EncoderBundle | None = None,
    *,
    collectives: Collectives | None = None,
) -> Engine:
    """Network, method and optimizer, initialised from the seed alone, but for an encoder to start from.

    Args:
        config: The job.
        device: Where they lie.
        init: The encoder.
        collectives: The ranks; by default those that this process has joined.

    Raises:
        ConfigError: the encoder is of another network.
        WeightsError: names what the network lacks, or has in another shape.
    """
    torch.manual_seed(config.engine.seed)
    backbone = build(config.backbone.name, **config.backbone.arguments)
    if init is not None:
        if init.backbone != config.backbone.name:
            raise ConfigError(
                f"init {config.init}",
                expected=f"an encoder of backbone.name {config.backbone.name}",
                found=init.backbone,
                remedy=f"set backbone.name to {init.backbone}, with the arguments {init.arguments}",
            )
        load_exact(backbone.net, init.weights, backbone.encoder_keys())  # before targets are copied from it
    method = method_class(config.method_name)(config.method_config, backbone)
    most = config.engine.micro_batch if has_batch_norm(backbone) else config.micro_batch
    settings = config.engine.model_copy(update={"micro_batch": most})
    return Engine(method, settings, collectives=collectives or current(), device=device)


def _starts_from(config: PretrainConfig, init: EncoderBundle) -> str:
    other = f"; it was trained with intensity {init.intensity}" if init.intensity != config.intensity else ""
    return f"starts from {config.init}: all {len(init.weights)} tensors of the encoder; decoder and heads new{other}"


def _shares(config: PretrainConfig, world: int, most: int | None) -> str:
    """What each worker of a job with `min_workers` has to do, for the log."""
    contrast = config.stream.global_batch // config.engine.accumulate
    share = contrast // world
    at_once = min(share, most or share)
    usual = contrast // config.cluster.workers
    more = f"; its batch norm wants them together, {usual} with all workers" if most is None and share > usual else ""
    return (
        f"{world} of at most {config.cluster.workers} workers: {config.stream.global_batch} samples a step and"
        f" {contrast} a contrast, as with any number, {at_once} at once in the network of a worker{more}"
    )


def run(
    config: PretrainConfig,
    hooks: Hooks,
    *,
    restore: Path | None,
    device: torch.device,
    cache_dir: Path | None = None,
    collectives: Collectives | None = None,
) -> dict[str, Any]:
    """Train to the last step, from a checkpoint when there is one.

    Args:
        config: The job.
        hooks: What the surroundings provide.
        restore: Directory of a checkpoint.
        device: Where to train.
        cache_dir: Folder of the node's crop cache; used when the configuration gives it room.
        collectives: The ranks; by default those that this process has joined.

    Returns:
        `steps` done, the `samples` digest, and the last metrics.
    """
    collectives = collectives or current()
    manifest = open_manifest(config)
    split = manifest.select(split=config.stream.split).tolist()
    driver.check_channels(manifest, split, f"backbone {config.backbone.name}", config.backbone.arguments)
    what = identity(config, manifest)
    init = None
    if config.init is not None and restore is None and collectives.rank == 0:  # whose weights all ranks get
        init = pull_encoder(config.init)
        hooks.say(_starts_from(config, init))
    engine = build_engine(config, device, init, collectives=collectives)
    if config.cluster.min_workers is not None and collectives.rank == 0:
        hooks.say(_shares(config, collectives.world, engine.config.micro_batch))
    record, journal, state = SampleRecord(), list[Point](), None
    if restore is not None:
        state, meta = checkpoint.load(restore)
        require_same(config, manifest, meta)
        engine.load_state_dict(state)
        record.value = meta["samples"]
        journal = [Point.from_json(item) for item in meta[JOURNAL]]
        if collectives.rank == 0:
            hooks.say(f"resumed at step {engine.step_done}")
    cache = None
    if config.stream.cache_gib and cache_dir is not None:
        cache = NodeCache(cache_dir, int(config.stream.cache_gib * 2**30))
    store = VolumeStore(config.data, manifest, cache=cache, store=hooks.open_store(config.data))
    spec = stream_spec(config)
    stream = CropStream(
        store,
        spec,
        rank=collectives.rank,
        world=collectives.world,
        start=engine.step_done * spec.global_batch,
        prefetch=config.stream.prefetch,
        threads=config.stream.threads,
    )
    method_views = view_spec(config)
    order = order_digest(spec, stream.indices)
    evidence = Evidence(
        config, manifest.fingerprint, engine, state, order=order, captures=hooks.captures, say=hooks.say
    )
    del state  # else a second copy of the weights stays for the whole run

    def batches() -> Iterator[tuple[ViewBatch, float]]:
        for batch in stream:
            hooks.on_batch(batch)
            record.add(batch, collectives)
            evidence.drawn(batch, record.value)
            views = make_views(
                batch,
                method_views,
                seed=config.engine.seed,
                policy=config.intensity,
                device=device,
                dtype=engine.dtype,
            )
            yield views, batch.wait_s

    pace = Pace(config.engine.steps)

    def report(step: int, metrics: dict[str, float]) -> None:
        hooks.last = {**hooks.last, **metrics}
        hooks.on_report(step, metrics, store.tallies())
        if collectives.rank:
            return
        item = point(step, metrics)
        journal.append(item)
        hooks.on_point(item)
        if "loss" in metrics:
            hooks.say(_line(pace.at(step), metrics))
        if metrics.get("probe/collapsed"):
            hooks.say(f"step {step}: COLLAPSE WARNING, {_probes(metrics)}")

    buffers = Buffers()

    def save(step: int, state: dict[str, Any]) -> None:
        chain = evidence.state()  # on all ranks, as shards are gathered for it
        if collectives.rank:
            hooks.publish(step, None, hooks.last)
            return
        journal[:] = [item for item in journal[:-1] if not hooks.is_recorded(item.step)] + journal[-1:]
        facts = {
            **what,
            "step": step,
            "stream": {"seed": spec.seed, "next": step * spec.global_batch},
            "samples": record.value,
            JOURNAL: [item.to_json() for item in journal],
            SETTINGS: resolved(config),
        }
        whole = {**state, **chain}
        hooks.publish(step, lambda: Snapshot.of(whole, facts, buffers), hooks.last)

    probe = LabelProbe(config, store, method_views, hooks.say if collectives.rank == 0 else _silent)
    with store, stream:
        steps = fit(engine, batches(), report=report, save=save, stop=hooks.stop, probe=probe)
    evidence.close()
    return {"steps": steps, "samples": record.value, **hooks.last}


def _silent(_line: str) -> None:
    """Rank 0 speaks for all."""


def _line(progress: Progress, metrics: dict[str, float]) -> str:
    terms = "".join(f"  {k.removeprefix('loss/')} {v:.4f}" for k, v in metrics.items() if k.startswith("loss/"))
    return (
        f"step {progress}  loss {metrics.get('loss', float('nan')):.4f}{terms}"
        f"  {metrics.get('time/samples_per_s', 0):.2f} samples/s"
        f"  data wait {100 * metrics.get('time/wait_share', 0):.1f} %"
    )


def _probes(metrics: dict[str, float]) -> str:
    return ", ".join(f"{k.removeprefix('probe/')} {v:.3g}" for k, v in metrics.items() if k.startswith("probe/"))
