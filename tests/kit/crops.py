"""Host batches made in memory, for tests of views."""

from dataclasses import fields, replace

import numpy as np

from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.placement_size import host_size
from storage.stream.crop_stream import HostBatch

AS_STORED = IntensityPolicy(kind="none")


def batch_of(image_BCDHW, start_B3, shape_DHW, *, label_BDHW=None, spacing=(1.0, 1.0, 1.0), first=0):
    count = len(image_BCDHW)
    return HostBatch(
        image_BCDHW=image_BCDHW,
        label_BDHW=label_BDHW,
        start_B3=np.asarray(start_B3, np.int64),
        volume_B=np.arange(count, dtype=np.int64),
        sample_B=np.arange(first, first + count, dtype=np.int64),
        scale_B=np.ones(count, np.float32),
        offset_B=np.zeros(count, np.float32),
        shape_B3=np.tile(np.asarray(shape_DHW, np.float64), (count, 1)),
        spacing_B3=np.tile(np.asarray(spacing, np.float64), (count, 1)),
        stats_BCS=np.tile(np.array([0, 100, 40, 20, 1, 99], np.float32), (*image_BCDHW.shape[:2], 1)),
    )


def starts(count, host_DHW, shape_DHW, seed=0):
    """Crops that hang over the border by a few voxels at most."""
    rng = np.random.default_rng(seed)
    last = np.maximum(np.array(shape_DHW) - np.array(host_DHW), 0)
    return rng.integers(-3, last + 4, (count, 3))


def coordinates(spec, count, shape_DHW=(80, 90, 100), seed=0, first=0, spacing=(1.0, 1.0, 1.0), dtype=np.float64):
    """Crops whose three channels are the volume edge coordinates of the voxel centres."""
    host = host_size(spec)
    start = starts(count, host, shape_DHW, seed)
    axes = [start[:, i, None] + np.arange(host[i]) + 0.5 for i in range(3)]
    image = np.stack([
        np.broadcast_to(axes[0][:, :, None, None], (count, *host)),
        np.broadcast_to(axes[1][:, None, :, None], (count, *host)),
        np.broadcast_to(axes[2][:, None, None, :], (count, *host)),
    ], axis=1)  # fmt: skip
    return batch_of(np.ascontiguousarray(image, dtype), start, shape_DHW, first=first, spacing=spacing)


def noise(spec, count, shape_DHW=(80, 90, 100), seed=0, first=0, channels=1):
    """Crops of random int16, with a random label."""
    host = host_size(spec)
    rng = np.random.default_rng(seed)
    image = rng.integers(-50, 120, (count, channels, *host)).astype(np.int16)
    label = rng.integers(0, 9, (count, *host)).astype(np.uint8)
    return batch_of(image, starts(count, host, shape_DHW, seed), shape_DHW, label_BDHW=label, first=first)


def part(batch, rows):
    """The samples `rows` of a batch."""
    arrays = {f.name: getattr(batch, f.name) for f in fields(batch)}
    cut = {name: array[rows] for name, array in arrays.items() if isinstance(array, np.ndarray)}
    return replace(batch, **cut, maps_BDHW={name: ids[rows] for name, ids in batch.maps_BDHW.items()})
