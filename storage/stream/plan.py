"""What a stream will read, before it reads anything: its settings, its volumes, and the crops of each batch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.format.records import VolumeRecord, without_places
from storage.reading.volume_store import Crop
from storage.stream import order


@dataclass(frozen=True)
class StreamSpec:
    """What is streamed; with the manifest it fixes the whole global sequence.

    Attributes:
        seed: Any whole number from 0 to 2**63 - 1.
        global_batch: Samples of a batch over all ranks; a multiple of the world size.
        crop_DHW: Voxels of a crop.
        lanes: Interleaved sub-sequences; a multiple of every world size the run may have.
        crops_per_visit: Crops cut each time a lane comes to a volume; more of them read less and repeat volumes sooner.
        split: Volumes of this split, where `indices` is None; an empty string takes all volumes.
        indices: Manifest indices to stream instead, for example a few labelled subjects; their order matters.
        label: Name of the label map that is read along with the image; volumes without it are left out of `split`.
        foreground: Probability that a crop is centred in the volume's foreground box, not just anywhere in the volume.
        class_balance: Probability that a crop is centred on a voxel of a labelled class instead, each class as likely;
            needs `label`.
        class_draw: Which classes those are. `volume`: of the volume that the order has come to. `all`: of all volumes
            of the stream; where the volume lacks the drawn class, one that has it takes its place, each as likely.
        maps: Names of further label maps or derived maps that are read along; volumes without them are left out of
            `split` as well.
    """

    seed: int
    global_batch: int
    crop_DHW: tuple[int, int, int]
    lanes: int = 64
    crops_per_visit: int = 4
    split: str = "train"
    indices: tuple[int, ...] | None = None
    label: str | None = None
    foreground: float = 1.0
    class_balance: float = 0.0
    maps: tuple[str, ...] = ()
    class_draw: Literal["volume", "all"] = "volume"


_MAP_BYTES = 4
"""Of a voxel of a label or derived map, whose types differ between volumes: int32 is the largest."""


def check_spec(spec: StreamSpec, *, rank: int = 0, world: int = 1) -> None:
    """Refuse a spec that cannot be streamed by `world` ranks.

    Raises:
        ConfigError: names the setting and proposes values.
    """
    order.check(
        seed=spec.seed,
        lanes=spec.lanes,
        global_batch=spec.global_batch,
        crops_per_visit=spec.crops_per_visit,
        world=world,
        rank=rank,
    )
    if len(spec.crop_DHW) != 3 or min(spec.crop_DHW) < 1:
        raise ConfigError("crop_DHW", expected="three positive numbers of voxels", found=str(spec.crop_DHW))
    for name, value in (("foreground", spec.foreground), ("class_balance", spec.class_balance)):
        if not 0.0 <= value <= 1.0:
            raise ConfigError(name, expected="a probability from 0 to 1", found=str(value))
    if spec.class_balance and spec.label is None:
        raise ConfigError(
            "class_balance", expected="a label to balance", found="label is not set", remedy="set `label`"
        )


def select(manifest: Manifest, spec: StreamSpec) -> npt.NDArray[np.int64]:
    """Manifest indices of the n volumes of a stream, (n,), int64.

    Raises:
        ConfigError: none are left, or one is outside the manifest or given twice.
    """
    if spec.indices is None:
        rows = np.asarray(manifest.select(split=spec.split or None, labelled=spec.label), dtype=np.int64)
        for name in spec.maps:
            rows = np.intersect1d(rows, manifest.select(labelled=name))
        description = f"volumes of split {spec.split!r}" if spec.split else "volumes"
        if spec.label is not None:
            description += f" with label {spec.label!r}"
        if spec.maps:
            description += " with " + ", ".join(map(repr, spec.maps))
        if not len(rows):
            remedy = "`tomoscale data show` lists splits and labels"
            raise ConfigError("stream", expected=description, found=f"none among {len(manifest)}", remedy=remedy)
        return rows
    rows = np.array(spec.indices, dtype=np.int64)
    if not len(rows) or rows.min() < 0 or rows.max() >= len(manifest) or len(np.unique(rows)) != len(rows):
        expected = f"at least one index from 0 to {len(manifest) - 1}, each once"
        raise ConfigError("indices", expected=expected, found=str(spec.indices)[:120])
    return rows


def order_digest(spec: StreamSpec, indices: npt.NDArray[np.int64]) -> str:
    """SHA-256, hexadecimal, of the settings of a stream and of the volumes of its first 4096 samples.

    Args:
        spec: The stream.
        indices: Of its volumes, from `select`.
    """
    settings = {item.name: getattr(spec, item.name) for item in fields(spec) if item.name != "indices"}
    if spec.class_draw == "volume":  # as before there was another: what an earlier version wrote is gone on from
        del settings["class_draw"]
    first = order.places(
        np.arange(4096), seed=spec.seed, n=len(indices), lanes=spec.lanes, crops_per_visit=spec.crops_per_visit
    )
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in (indices[first.position], first.visit, first.cut):
        digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()


def _largest_voxel(manifest: Manifest, indices: npt.NDArray[np.int64]) -> int:
    """Bytes of a voxel, all channels, of the volume that has most: types may differ within a data set."""
    codes, kinds = manifest.kinds()
    used = [kinds[code] for code in np.unique(codes[indices]).tolist()]
    sizes: list[int] = [np.dtype(dtype).itemsize * count for dtype, count in used]
    return max(sizes)


@dataclass(frozen=True, slots=True)
class Cut:
    """One sample of the order: which crop of which volume."""

    sample: int
    volume: int
    crop: Crop
    centre: tuple[int, int, int]
    """Voxel that the crop was drawn about, (D, H, W)."""


class Plan:
    """What batch k of one rank holds, and what is read for it; pure, shared by threads."""

    def __init__(
        self,
        manifest: Manifest,
        spec: StreamSpec,
        indices: npt.NDArray[np.int64],
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        memory_bytes: int = 1 << 30,
    ) -> None:
        self.spec, self.rank, self.world, self.start = spec, rank, world, start
        self._indices = indices
        places_of = spec.label if spec.class_balance else None

        def facts(i: int) -> VolumeRecord:
            return without_places(manifest.record(i), keep=places_of)

        # Reading a row of the manifest costs more than planning a crop, and a visit asks for it several times.
        self.record = lru_cache(maxsize=4096)(facts)
        voxel_bytes = _largest_voxel(manifest, indices) + _MAP_BYTES * (len(spec.maps) + (spec.label is not None))
        crop_bytes = int(np.prod(spec.crop_DHW)) * voxel_bytes
        # A lane that reads k crops at a time holds (k - 1) / 2 of them on average.
        room = 2 * memory_bytes * world // (spec.lanes * crop_bytes) + 1
        self.per_read = max(1, min(spec.crops_per_visit, room))
        # The volumes that have points of each class, of the whole stream: every row of its manifest is read for it.
        self._holders: list[tuple[int, list[int]]] = []
        if spec.class_draw == "all" and spec.class_balance:
            holders: dict[int, list[int]] = {}
            for index in indices.tolist():
                for value in _points_of(self.record(index), spec.label):
                    holders.setdefault(value, []).append(index)
            self._holders = sorted(holders.items())

    def batch(self, k: int) -> list[int]:
        """Global samples of this rank's share of batch k, ascending."""
        spec = self.spec
        first = self.start + k * spec.global_batch
        sample_B = order.owned(first, spec.global_batch, lanes=spec.lanes, rank=self.rank, world=self.world)
        return [int(sample) for sample in sample_B]

    def places(self, samples: Sequence[int]) -> order.Places:
        """Where global samples lie in the order; costs the same for any number of volumes."""
        spec, n = self.spec, len(self._indices)
        sample_B = np.array(samples, dtype=np.int64)
        return order.places(sample_B, seed=spec.seed, n=n, lanes=spec.lanes, crops_per_visit=spec.crops_per_visit)

    def reads(self, k: int) -> list[list[Cut]]:
        """Groups of cuts, each of one visit, that batch k is the first to need; later batches find theirs read.

        The visit that a lane is in at the start is read cut by cut. Read in one go, the first batches would all read
        for later ones, and a trainer would wait for two to three batches' worth of crops with each of them.
        """
        spec, samples = self.spec, self.batch(k)
        where = self.places(samples)
        groups = []
        for sample, cut, position in zip(samples, where.cut.tolist(), where.position.tolist(), strict=True):
            length = min(self.per_read, spec.crops_per_visit - cut)
            if sample - cut * spec.lanes < self.start + spec.lanes:
                length = 1
            elif cut % self.per_read:
                continue
            volume = int(self._indices[position])
            groups.append([self._cut(sample + t * spec.lanes, volume) for t in range(length)])
        return groups

    def _cut(self, sample: int, volume: int) -> Cut:
        spec = self.spec
        drawn = order.drawn_class(sample, seed=spec.seed, classes=len(self._holders), class_balance=spec.class_balance)
        if drawn is None:
            points = list(self._points(volume).values())
        else:
            value, volumes = self._holders[drawn[0]]
            volume = volume if volume in volumes else volumes[int(drawn[1] * len(volumes))]
            points = [self._points(volume)[value]]
        record = self.record(volume)
        centre = order.crop_centre(
            sample,
            seed=spec.seed,
            shape=record.shape_DHW,
            box=(record.foreground_lo, record.foreground_hi),
            points=points,
            foreground=spec.foreground,
            class_balance=spec.class_balance,
        )
        start = order.crop_start(centre, shape=record.shape_DHW, size=spec.crop_DHW)
        return Cut(sample, volume, Crop(record.volume_id, start, spec.crop_DHW), centre)

    def _points(self, volume: int) -> dict[int, Sequence[order.Box3]]:
        return _points_of(self.record(volume), self.spec.label) if self.spec.class_balance else {}


def _points_of(record: VolumeRecord, label: str | None) -> dict[int, Sequence[order.Box3]]:
    """Voxels of each class that a label map shows, by value; a class without any is left out."""
    return {
        value: points
        for info in record.labels
        if info.name == label
        for value, points in zip(info.values, info.points, strict=True)
        if value != 0 and len(points)
    }
