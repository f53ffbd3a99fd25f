"""Reading crops of volumes: planned, merged, concurrent and checked range reads.

A crop comes back as exactly the stored voxels, or as an error that names volume and key. Nothing is substituted: padding is
added only where a crop reaches beyond its volume.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from storage.bytestore import join, open_store
from storage.cache import NodeCache
from storage.codecs import Damaged
from storage.errors import ConfigError, CorruptChunk, NotFound
from storage.layout import Layout, choose_layout
from storage.manifest import Manifest, Triple, VolumeRecord
from storage.readplan import GAP, MOST, Box, Need, Range, merge, needs, overlap
from storage.shardindex import Index, parse_index
from storage.volumewriter import content_sha256, label_record, write_volume
from storage.zarrmeta import ArrayMeta, default_meta, parse_array

__all__ = [
    "Crop",
    "Layout",
    "VolumeStore",
    "choose_layout",
    "content_sha256",
    "label_record",
    "padding_value",
    "write_volume",
]

Array = npt.NDArray[Any]
T = TypeVar("T")
INDEXES_KEPT = 4096
SMALL_SHARD = 1 << 20
"""Raw bytes up to which a shard is fetched whole: its index would cost a round trip and save little."""


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


@dataclass(frozen=True, slots=True)
class _Source:
    """One array of one volume."""

    volume_id: str
    root: str
    meta: ArrayMeta
    content: str


class VolumeStore:
    """Read-only access to a published data set. Thread-safe; must not be carried through `fork`.

    Args:
        url: The data set's URL.
        manifest: The manifest to read by; the published one where not given.
        cache: On-disk cache of this node.
        threads: Requests in flight, each decoded by the thread that fetched it.
        gap, most: See `storage.readplan`.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest | None = None,
        *,
        cache: NodeCache | None = None,
        threads: int = 8,
        gap: int = GAP,
        most: int = MOST,
    ) -> None:
        if threads < 1:
            raise ConfigError("threads", expected="at least 1", found=str(threads))
        self.url = url
        self.store = open_store(url)
        self.manifest = manifest if manifest is not None else Manifest.open(self.store)
        self._cache, self._gap, self._most = cache, gap, most
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._indexes: _Recent[Index] = _Recent(INDEXES_KEPT)
        self._sources: _Recent[_Source] = _Recent(INDEXES_KEPT)
        self._records: _Recent[VolumeRecord] = _Recent(INDEXES_KEPT)

    def close(self) -> None:
        """End the threads; reads in progress finish first."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "VolumeStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, volume_id: str) -> VolumeRecord:
        """The facts of a volume, kept for recent ones."""
        return self._records.get(volume_id, lambda: self.manifest.record(self.manifest.index_of(volume_id)))

    def read(self, crop: Crop, label: str | None = None) -> Array:
        """One crop, (C, D, H, W) in the stored type, or (1, D, H, W) of a label; see `read_many`."""
        return self.read_many([crop], label)[0]

    def read_many(self, crops: Sequence[Crop], label: str | None = None) -> list[Array]:
        """Several crops by one plan: chunks they share are read once, near ranges merge, all requests run together.

        Returns:
            C-contiguous arrays (C, D, H, W) in the stored type; of a label (1, D, H, W). Beyond the volume an image holds
            the stored value of the foreground's minimum, a label 0.

        Raises:
            NotFound: no such volume, label or object.
            CorruptChunk: a shard or chunk is missing, empty, truncated or altered; names volume and key.
            StoreError: the store did not answer.
        """
        outs: list[Array] = []
        boxes_of: dict[str, list[int]] = {}
        boxes: list[Box] = []
        records = [self.record(crop.volume_id) for crop in crops]
        self._learn({r.volume_id: r for r in records}, label)
        for i, (crop, record) in enumerate(zip(crops, records, strict=True)):
            if any(n < 1 for n in crop.size_DHW):
                raise ConfigError(
                    f"crop of {crop.volume_id}", expected="a size of at least 1", found=str(crop.size_DHW)
                )
            meta = self._source(record, label).meta
            lead = meta.shape[:-3]
            stop = tuple(a + n for a, n in zip(crop.start_DHW, crop.size_DHW, strict=True))
            boxes.append(Box((*(0 for _ in lead), *crop.start_DHW), (*lead, *stop)))
            boxes_of.setdefault(crop.volume_id, []).append(i)
            native = meta.chain.dtype.newbyteorder("=")
            full = (*lead, *crop.size_DHW)
            inside = all(a >= 0 and b <= n for a, b, n in zip(crop.start_DHW, stop, meta.shape[-3:], strict=True))
            pad = 0 if label is not None else padding_value(record)
            outs.append(np.empty(full, native) if inside else np.full(full, pad, native))
        self._execute({v: ids for v, ids in boxes_of.items()}, boxes, outs, {r.volume_id: r for r in records}, label)
        return [out if out.ndim == 4 else out[None] for out in outs]

    def read_volume(self, volume_id: str, label: str | None = None) -> Array:
        """A whole volume, (C, D, H, W), or (1, D, H, W) of a label."""
        return self.read(Crop(volume_id, (0, 0, 0), self.record(volume_id).shape_DHW), label)

    def _execute(
        self,
        boxes_of: dict[str, list[int]],
        boxes: list[Box],
        outs: list[Array],
        records: dict[str, VolumeRecord],
        label: str | None,
    ) -> None:
        wanted: list[tuple[_Source, tuple[int, ...], list[Need], list[int]]] = []
        for volume_id, ids in boxes_of.items():
            source = self._source(records[volume_id], label)
            for shard, found in needs(source.meta, [boxes[i] for i in ids]).items():
                wanted.append((source, shard, list(found.values()), ids))

        def scatter(source: _Source, need: Need, ids: list[int], chunk: Array) -> None:
            for b in need.boxes:
                box = boxes[ids[b]]
                into, out_of = overlap(box, need.origin, source.meta.chunk, source.meta.shape)
                outs[ids[b]][into] = chunk[out_of]

        def begin(item: tuple[_Source, tuple[int, ...], list[Need], list[int]]) -> list[tuple[Any, ...]]:
            """Index of a shard, or all of a small one; returns what is still to be fetched."""
            source, shard, missing, ids = item
            key = f"{source.root}/{source.meta.shard_key(shard)}"
            slot = (key, source.content)
            index = self._indexes.peek(slot)
            whole: bytes | None = None
            if index is None:
                meta = source.meta
                raw = math.prod(meta.shard) * meta.chain.dtype.itemsize
                if raw <= SMALL_SHARD:
                    whole = self._read(source, key, lambda: self.store.get(key))
                    tail = whole[-meta.index_bytes :] if meta.index_at_end else whole[: meta.index_bytes]
                elif meta.index_at_end:
                    tail = self._read(source, key, lambda: self.store.get_suffix(key, meta.index_bytes))
                else:
                    tail = self._read(source, key, lambda: self.store.get_range(key, 0, meta.index_bytes))
                index = self._parse(source, key, tail, None if whole is None else len(whole))
                self._indexes.put(slot, index)
            for need in missing:
                if index[need.number, 0] < 0:
                    raise _corrupt(source, key, f"chunk {need.number} is not stored in its shard")
            ranges = merge(missing, index, gap=self._gap, most=self._most)
            if whole is not None:
                for r in ranges:
                    finish((source, key, r, ids), whole[r.start : r.stop])
                return []
            return [(source, key, r, ids) for r in ranges]

        def finish(item: tuple[_Source, str, Range, list[int]], data: bytes) -> None:
            source, key, r, ids = item
            view = memoryview(data)
            for need, start, stop in r.chunks:
                try:
                    chunk = source.meta.chain.decode(view[start - r.start : stop - r.start], source.meta.chunk)
                except Damaged as error:
                    raise _corrupt(source, key, f"chunk {need.number}, bytes [{start}, {stop}): {error}") from error
                scatter(source, need, ids, chunk)

        def fetch(item: tuple[_Source, str, Range, list[int]]) -> None:
            source, key, r, _ = item
            finish(item, self._read(source, key, lambda: self.store.get_range(key, r.start, r.stop)))

        todo = [fetchable for part in self._all(begin, wanted) for fetchable in part]
        self._all(fetch, todo)

    def _all(self, work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        if len(items) == 1:
            return [work(items[0])]
        return list(self._pool.map(work, items))

    def _read(self, source: _Source, key: str, call: Callable[[], bytes]) -> bytes:
        """A store call whose errors name the volume."""
        try:
            return call()
        except NotFound as error:
            raise NotFound(
                f"volume {source.volume_id}: {join(self.url, key)}",
                expected="the shard that the manifest promises",
                found="no such object",
                remedy="`tomoscale data verify` lists every damage; ingest the volume again",
            ) from error
        except CorruptChunk as error:
            raise _corrupt(source, join(self.url, key), error.found) from error

    def _parse(self, source: _Source, key: str, tail: bytes, size: int | None) -> Index:
        try:
            return parse_index(tail, math.prod(source.meta.grid), crc=source.meta.index_crc, size=size)
        except Damaged as error:
            raise _corrupt(source, join(self.url, key), f"shard index: {error}") from error

    def _learn(self, records: dict[str, VolumeRecord], label: str | None) -> None:
        """Fetch together the metadata that the manifest does not hold."""
        unknown = [r for r in records.values() if self._sources.peek((r.volume_id, label)) is None]
        if unknown:
            self._all(lambda record: self._source(record, label), unknown)

    def _source(self, record: VolumeRecord, label: str | None) -> _Source:
        def make() -> _Source:
            root = f"volumes/{record.volume_id}"
            dtype = record.dtype
            shape: tuple[int, ...] = (record.channels, *record.shape_DHW)
            chunk: tuple[int, ...] = (1, *record.chunk_DHW)
            shard: tuple[int, ...] = (record.channels, *record.shard_DHW)
            if label is not None:
                dtype = record.label(label).dtype
                root, shape, chunk, shard = f"{root}/labels/{label}", shape[1:], chunk[1:], shard[1:]
            source = _Source(record.volume_id, f"{root}/0", _NO_META, record.content_sha256)
            if record.codecs == "default" and dtype:
                meta = default_meta(shape, shard, chunk, np.dtype(dtype))
            else:
                key = f"{root}/0/zarr.json"
                document = self._read(source, key, lambda: self.store.get(key))
                meta = parse_array(document, f"volume {record.volume_id}: {join(self.url, key)}")
                if meta.shape != shape:
                    raise _corrupt(source, join(self.url, key), f"shape {meta.shape} where the manifest says {shape}")
            return _Source(record.volume_id, f"{root}/0", meta, record.content_sha256)

        return self._sources.get((record.volume_id, label), make)


def padding_value(record: VolumeRecord) -> float | int:
    """The stored value that stands for "nothing here": the foreground's minimum, rounded and clipped to the stored type."""
    dtype = np.dtype(record.dtype)
    value = (record.stats["min"] - record.offset) / record.scale
    if dtype.kind == "f":
        return float(value)
    info = np.iinfo(dtype)
    return int(min(info.max, max(info.min, round(value))))


_NO_META = default_meta((1,), (1,), (1,), np.dtype("uint8"))


def _corrupt(source: _Source, key: str, found: str) -> CorruptChunk:
    return CorruptChunk(
        f"volume {source.volume_id}: {key}",
        expected="the chunk that was written",
        found=found,
        remedy="`tomoscale data verify` lists every damage; ingest the volume again",
    )


class _Recent(Generic[T]):
    """A bounded map of the entries used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def peek(self, key: Hashable) -> T | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            return None

    def put(self, key: Hashable, value: T) -> None:
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            if len(self._entries) > self._most:
                self._entries.popitem(last=False)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        found = self.peek(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found
