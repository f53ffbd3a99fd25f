"""Reading crops of volumes: planned, merged, concurrent and checked range reads.

A crop comes back as exactly the stored voxels, or as an error that names volume and key. Nothing is substituted:
padding is added only where a crop reaches beyond its volume.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.format.records import DEFAULT_CODECS, Triple, VolumeRecord, without_places
from storage.format.zarr_metadata import ArrayMeta, default_meta, parse_array
from storage.objects import ByteStore, join, open_store
from storage.objects.traffic import tally_of
from storage.reading.executor import INDEXES_KEPT, Executor
from storage.reading.node_cache import NodeCache
from storage.reading.plan import GAP, MOST, Box
from storage.reading.recent import Recent
from storage.reading.request import Request, Source

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Crop:
    """A box of one volume.

    Args:
        start_DHW: First voxel; may be negative or beyond the volume, which is then padded.
        size_DHW: Extent in voxels.
    """

    volume_id: str
    start_DHW: Triple
    size_DHW: Triple


class VolumeStore:
    """Read-only access to a published data set. Thread-safe; refuses to work in a fork of its process.

    Args:
        url: The data set's URL.
        manifest: The manifest to read by; the published one where not given.
        cache: On-disk cache of this node.
        threads: Requests in flight, each decoded by the thread that fetched it; they mostly wait for the store.
        gap, most: See `storage.reading.plan`.
        store: The store at `url`, where it was opened by another way than `open_store`, such as one that counts.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest | None = None,
        *,
        cache: NodeCache | None = None,
        threads: int = 16,
        gap: int = GAP,
        most: int = MOST,
        store: ByteStore | None = None,
    ) -> None:
        if threads < 1:
            raise ConfigError("threads", expected="at least 1", found=str(threads))
        self.url = url
        self.store = store if store is not None else open_store(url)
        self.manifest = manifest if manifest is not None else Manifest.open(self.store)
        self._cache = cache
        self._executor = Executor(self.store, cache, threads, gap, most)
        self._sources: Recent[Source] = Recent(INDEXES_KEPT)
        self._records: Recent[VolumeRecord] = Recent(INDEXES_KEPT)

    def close(self) -> None:
        """End the threads; reads in progress finish first."""
        self._executor.close()

    def __enter__(self) -> "VolumeStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tallies(self) -> dict[str, int]:
        """Counts since it was opened: `requests`, `retries` and `read_bytes` of S3 or HTTP, `cache_hits` and
        `cache_misses` in chunks."""
        tally = tally_of(self.store)
        hits, misses = (self._cache.counts.hits, self._cache.counts.misses) if self._cache is not None else (0, 0)
        return {**asdict(tally), "cache_hits": hits, "cache_misses": misses}

    def record(self, volume_id: str) -> VolumeRecord:
        """The facts of a volume."""
        return self.manifest.record(self.manifest.index_of(volume_id))

    def meta(self, volume_id: str, label: str | None = None) -> ArrayMeta:
        """Shape, shards, chunks and codecs of a volume's array or of one of its labels."""
        return self._source(self._facts(volume_id), label).meta

    def read(self, crop: Crop, label: str | None = None) -> Array:
        """One crop, (C, D, H, W) in the stored type, or (1, D, H, W) of a label or derived map; see `read_many`."""
        return self.read_many([crop], label)[0]

    def read_many(self, crops: Sequence[Crop], label: str | None = None) -> list[Array]:
        """Several crops by one plan: chunks they share are read once, near ranges merge, all requests run together.

        Returns:
            C-contiguous arrays (C, D, H, W) in the stored type; of a label (1, D, H, W). Beyond the volume an image
            holds the stored value of its channel's foreground minimum, a label 0.

        Raises:
            NotFound: no such volume, label or object.
            CorruptChunk: a shard or chunk is missing, empty, truncated or altered; names volume and key.
            StoreError: the store did not answer.
        """
        records = {crop.volume_id: self._facts(crop.volume_id) for crop in crops}
        recent = {name: self._sources.peek((name, label)) for name in records}
        sources = {name: source for name, source in recent.items() if source is not None}
        unread = [record for name, record in records.items() if name not in sources]
        for source in self._executor.each(lambda record: self._source(record, label), unread):
            sources[source.volume_id] = source
        by_volume: dict[str, tuple[list[Box], list[Array]]] = {name: ([], []) for name in records}
        outs: list[Array] = []
        for crop in crops:
            box, out = _box_and_array(crop, sources[crop.volume_id].meta, records[crop.volume_id], label)
            boxes, arrays = by_volume[crop.volume_id]
            boxes.append(box)
            arrays.append(out)
            outs.append(out)
        self._executor.fill([Request(sources[name], boxes, arrays) for name, (boxes, arrays) in by_volume.items()])
        return [out if out.ndim == 4 else out[None] for out in outs]

    def read_volume(self, volume_id: str, label: str | None = None) -> Array:
        """A whole volume, (C, D, H, W), or (1, D, H, W) of a label."""
        return self.read(Crop(volume_id, (0, 0, 0), self._facts(volume_id).shape_DHW), label)

    def _facts(self, volume_id: str) -> VolumeRecord:
        """What reading needs to know of a volume, kept for recent ones."""
        return self._records.get(volume_id, lambda: without_places(self.record(volume_id)))

    def _source(self, record: VolumeRecord, label: str | None) -> Source:
        return self._sources.get((record.volume_id, label), lambda: self._find(record, label))

    def _find(self, record: VolumeRecord, label: str | None) -> Source:
        """The array's metadata: as the manifest implies them, or read where it does not."""
        root = f"volumes/{record.volume_id}"
        dtype, content = record.dtype, record.content_sha256
        shape: tuple[int, ...] = (record.channels, *record.shape_DHW)
        chunk: tuple[int, ...] = (1, *record.chunk_DHW)
        shard: tuple[int, ...] = (record.channels, *record.shard_DHW)
        if label is not None:
            dtype, content = record.map_facts(label)
            root, shape, chunk, shard = f"{root}/labels/{label}", shape[1:], chunk[1:], shard[1:]
        root = f"{root}/0"
        if record.codecs == DEFAULT_CODECS and dtype:
            meta = default_meta(shape, shard, chunk, np.dtype(dtype))
            return Source(record.volume_id, root, meta, content)
        key = f"{root}/zarr.json"
        unread = Source(record.volume_id, root, default_meta(shape, shape, shape, np.dtype("u1")), "")
        document = self._executor.checked(unread, key, lambda: self.store.get(key))
        meta = parse_array(document, f"volume {record.volume_id}: {join(self.url, key)}")
        if meta.shape != shape:
            raise self._executor.corrupt(unread, key, f"shape {meta.shape} where the manifest says {shape}")
        if dtype and meta.chain.dtype.name != dtype:
            raise self._executor.corrupt(unread, key, f"type {meta.chain.dtype.name} where the manifest says {dtype}")
        return Source(record.volume_id, root, meta, content)


def _box_and_array(crop: Crop, meta: ArrayMeta, record: VolumeRecord, label: str | None) -> tuple[Box, Array]:
    if any(n < 1 for n in crop.size_DHW):
        raise ConfigError(f"crop of {crop.volume_id}", expected="a size of at least 1", found=str(crop.size_DHW))
    lead = meta.shape[:-3]
    stop = tuple(a + n for a, n in zip(crop.start_DHW, crop.size_DHW, strict=True))
    native = meta.chain.dtype.newbyteorder("=")
    full = (*lead, *crop.size_DHW)
    inside = all(a >= 0 and b <= n for a, b, n in zip(crop.start_DHW, stop, meta.shape[-3:], strict=True))
    # What lies inside is always overwritten, so that memory is only initialised where something lies outside.
    out: Array = np.empty(full, native)
    if not inside:
        out[...] = 0 if label is not None else np.reshape(padding_values(record), (-1, 1, 1, 1))
    return Box((*(0 for _ in lead), *crop.start_DHW), (*lead, *stop)), out


def padding_values(record: VolumeRecord) -> tuple[float | int, ...]:
    """The stored value for "nothing here" of each channel: its foreground's minimum, rounded, in the stored type."""
    dtype = np.dtype(record.dtype)
    values = [(channel["min"] - record.offset) / record.scale for channel in record.stats]
    if dtype.kind == "f":
        return tuple(values)
    info = np.iinfo(dtype)
    return tuple(int(min(info.max, max(info.min, round(value)))) for value in values)
