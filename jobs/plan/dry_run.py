"""A job built whole and stepped once, in this process; nothing is sent and nothing is written."""

import time

import numpy as np
import torch

from jobs.configs import PretrainConfig
from jobs.plan.measure import trained
from jobs.plan.one_rank import OneRank, device_of
from jobs.pretrain.inputs import require_superpixels, stream_spec, view_spec
from jobs.pretrain.loop import Hooks, Take, build_engine, run
from ssl_core.views.make import make_views
from storage.errors import ConfigError, CorruptChunk, NotFound, StoreError
from storage.format.manifest import Manifest
from storage.intensity_stats import STATS_ORDER
from storage.objects import open_store
from storage.objects.retry import RetryPolicy
from storage.stream.crop_stream import HostBatch

_PATIENCE = RetryPolicy(deadline_s=8.0, attempt_s=3.0)
"""For a store that the nodes may reach and this machine may not."""


def dry_run(config: PretrainConfig) -> str:
    """Build network, method, optimizer and stream as the first worker of the job, and take its first step.

    Where the volumes cannot be read from here, or are not there yet, the step is taken on noise.

    Returns:
        What was done, for a person.

    Raises:
        TomoscaleError: what the job would end with: settings that do not fit the data, damaged data, a loss that is
            not finite.
    """
    device = device_of(config)
    reason = _unreadable(config)
    began = time.perf_counter()
    loss, parameters, samples = _on_noise(config, device) if reason else _on_data(config, device)
    where = "its GPU" if device.type == "cuda" else "the CPU" if not config.cluster.gpu else "the CPU, without a GPU"
    lines = [
        f"dry run: one step as the first of {config.cluster.workers} worker(s), on {where} of this machine: "
        f"{samples} samples, {parameters:,} trainable parameters, loss {loss:.4f}, {time.perf_counter() - began:.1f} s"
    ]
    lines.append(f"on noise, not on {config.data}: {reason}" if reason else f"on {config.data}")
    return "\n".join([*lines, "nothing was sent"])


def _unreadable(config: PretrainConfig) -> str:
    """Why the job's first batch cannot be read now; empty where it can."""
    try:
        manifest = Manifest.open(open_store(config.data, _PATIENCE), config.fingerprint)
    except CorruptChunk:
        raise
    except NotFound as error:
        if config.fingerprint:
            raise
        then = f"the job will ingest {config.source}" if config.source else "ingest into it before the job starts"
        return f"{error.found}; {then}"
    except (StoreError, ConfigError) as error:
        return str(error)
    try:
        require_superpixels(config, manifest, view_spec(config))
    except ConfigError as error:
        return f"{error.found}; the job will make them"
    return ""


def _on_data(config: PretrainConfig, device: torch.device) -> tuple[float, int, int]:
    """Loss, parameters and samples of a step on the job's own first batch, by the job's own loop."""
    sizes: list[int] = []
    losses: list[float] = []
    parameters: list[int] = []

    def publish(_step: int, take: Take | None, _metrics: dict[str, float]) -> None:
        assert take is not None, "rank 0 takes the checkpoint"
        parameters.append(sum(tensor.numel() for tensor in trained(take().state)))

    hooks = Hooks(
        publish=publish,
        on_point=lambda point: losses.append(point.metrics["loss"]),
        is_recorded=lambda _step: True,
        stop=lambda: True,
        on_batch=lambda batch: sizes.append(len(batch.sample_B)),
    )
    run(config, hooks, restore=None, device=device, collectives=OneRank(config.cluster.workers))
    return losses[0], parameters[0], sizes[0]


def _on_noise(config: PretrainConfig, device: torch.device) -> tuple[float, int, int]:
    """The same of a step on crops that are made up."""
    batch = _noise(config)
    engine = build_engine(config, device, collectives=OneRank(config.cluster.workers))
    views = make_views(
        batch, view_spec(config), seed=config.engine.seed, policy=config.intensity, device=device, dtype=engine.dtype
    )
    loss = engine.step(views)["loss"]
    return loss, sum(tensor.numel() for tensor in trained(engine.state_dict())), len(batch.sample_B)


def _noise(config: PretrainConfig) -> HostBatch:
    """A batch of one worker, of the sizes that the job reads."""
    spec = stream_spec(config)
    count, channels = spec.global_batch // config.cluster.workers, int(config.backbone.arguments.get("in_channels", 1))
    draws = np.random.Generator(np.random.Philox(key=config.engine.seed))
    image = draws.integers(0, 1000, (count, channels, *spec.crop_DHW), dtype=np.int16)
    stats = dict(min=0, max=999, mean=500, std=288, p0_5=5, p99_5=994)
    return HostBatch(
        image_BCDHW=image,
        label_BDHW=None,
        start_B3=np.zeros((count, 3), np.int64),
        volume_B=np.zeros(count, np.int64),
        sample_B=np.arange(count, dtype=np.int64),
        scale_B=np.ones(count, np.float32),
        offset_B=np.zeros(count, np.float32),
        shape_B3=np.tile(np.array(spec.crop_DHW, np.float64), (count, 1)),
        spacing_B3=np.ones((count, 3)),
        stats_BCS=np.tile(np.array([stats[name] for name in STATS_ORDER], np.float32), (count, channels, 1)),
        maps_BDHW={name: draws.integers(0, 8, (count, *spec.crop_DHW), dtype=np.int32) for name in spec.maps},
    )
