"""Executing a read plan: node cache, shard indexes, merged range requests, checks and decoding, in threads."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from storage.bytestore import ByteStore, join
from storage.cache import NodeCache, Slab
from storage.codecs import Damaged, Scratch
from storage.errors import CorruptChunk, NotFound
from storage.readplan import Box, Need, Range, merge, needs, overlap
from storage.shardindex import Index, parse_index
from storage.zarrmeta import ArrayMeta

Array = npt.NDArray[Any]
T = TypeVar("T")
S = TypeVar("S")
INDEXES_KEPT = 4096
SMALL_SHARD = 1 << 20
"""Raw bytes up to which a shard is fetched whole: its index would cost a round trip and save little."""
CACHED_TOGETHER = 24  # chunks that one thread takes from the node cache
REMEDY = "`tomoscale data verify` lists every damage; ingest the volume again"


@dataclass(frozen=True, slots=True)
class Source:
    """One array of one volume.

    Args:
        root: Its key in the store.
        content: Digest of the volume's voxels, which keeps cached chunks of an older volume from being taken for this one.
    """

    volume_id: str
    root: str
    meta: ArrayMeta
    content: str


@dataclass(frozen=True, slots=True)
class Request:
    """Boxes of one source and the arrays they fill; an array has its box's extent in stored, native byte order."""

    source: Source
    boxes: Sequence[Box]
    outs: Sequence[Array]


@dataclass(frozen=True, slots=True)
class _Part:
    """Chunks of one shard that a request needs."""

    request: Request
    key: str
    wanted: Sequence[Need]


class Executor:
    """Fills requests from a store. Thread-safe.

    Args:
        store: Where the objects are.
        cache: Decoded chunks of this node, or None.
        threads: Requests in flight; each answer is decoded by the thread that fetched it.
        gap, most: See `storage.readplan`.
    """

    def __init__(self, store: ByteStore, cache: NodeCache | None, threads: int, gap: int, most: int) -> None:
        self._store, self._cache, self._gap, self._most = store, cache, gap, most
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._indexes: Recent[Index] = Recent(INDEXES_KEPT)
        self._scratch = Scratch()

    def close(self) -> None:
        """End the threads; work in progress finishes first."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def fill(self, requests: Sequence[Request]) -> None:
        """Fill the arrays of every request. Voxels outside a volume are left as they are.

        Raises:
            NotFound: a shard is missing.
            CorruptChunk: an index or a chunk is missing, truncated or altered.
            StoreError: the store did not answer.
        """
        parts = [
            _Part(request, f"{request.source.root}/{request.source.meta.shard_key(shard)}", list(found.values()))
            for request in requests
            for shard, found in needs(request.source.meta, request.boxes).items()
        ]
        if self._cache is not None:
            groups = [
                _Part(part.request, part.key, part.wanted[at : at + CACHED_TOGETHER])
                for part in parts
                for at in range(0, len(part.wanted), CACHED_TOGETHER)
            ]
            missed = self.each(self._from_cache, groups)
            left: dict[tuple[int, str], list[Need]] = {}
            for group, wanted in zip(groups, missed, strict=True):
                left.setdefault((id(group.request), group.key), []).extend(wanted)
            parts = [_Part(p.request, p.key, found) for p in parts if (found := left[(id(p.request), p.key)])]
        fetches = [item for items in self.each(self._locate, parts) for item in items]
        self.each(self._fetch, fetches)

    def each(self, work: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Call `work` on every item, in threads; the first failure is raised and what has not begun is dropped."""
        if len(items) <= 1:
            return [work(item) for item in items]
        futures = [self._pool.submit(work, item) for item in items]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in futures:
            if future in done and (error := future.exception()) is not None:
                raise error
        return [future.result() for future in futures]

    def checked(self, source: Source, key: str, call: Callable[[], bytes]) -> bytes:
        """A store call whose errors name the volume."""
        try:
            return call()
        except NotFound as error:
            raise NotFound(
                f"volume {source.volume_id}: {join(self._store.url, key)}",
                expected="an object that the manifest promises",
                found="none",
                remedy=REMEDY,
            ) from error
        except CorruptChunk as error:
            raise self.corrupt(source, key, f"{error.found} where {error.expected} belong") from error

    def corrupt(self, source: Source, key: str, found: str) -> CorruptChunk:
        """The error of a damaged object."""
        return CorruptChunk(
            f"volume {source.volume_id}: {join(self._store.url, key)}",
            expected="what was written",
            found=found,
            remedy=REMEDY,
        )

    def _slab(self, source: Source, key: str) -> Slab | None:
        if self._cache is None:
            return None
        meta = source.meta
        name = f"{join(self._store.url, key)}|{source.content}"
        return self._cache.slab(name, math.prod(meta.grid), math.prod(meta.chunk) * meta.chain.dtype.itemsize)

    def _from_cache(self, part: _Part) -> Sequence[Need]:
        """Take what the node has; returns the rest."""
        source = part.request.source
        slab = self._slab(source, part.key)
        if slab is None:
            return part.wanted
        meta = source.meta
        size = math.prod(meta.chunk) * meta.chain.dtype.itemsize
        native = meta.chain.dtype.newbyteorder("=")
        missed = []
        for need in part.wanted:
            buffer = self._scratch.take(size + 8)
            if slab.read(need.number, buffer):
                _scatter(part.request, need, np.frombuffer(buffer[:size], native).reshape(meta.chunk))
            else:
                missed.append(need)
        return missed

    def _locate(self, part: _Part) -> list[tuple[_Part, Range]]:
        """The ranges to fetch of one shard; a small shard is fetched and done with here."""
        source, key = part.request.source, part.key
        meta = source.meta
        slot = (key, source.content)
        index = self._indexes.peek(slot)
        whole: bytes | None = None
        if index is None:
            if math.prod(meta.shard) * meta.chain.dtype.itemsize <= SMALL_SHARD:
                index, whole = self._whole(source, key)
            else:
                index = self._index(source, key)
            self._indexes.put(slot, index)
        for need in part.wanted:
            if index[need.number, 0] < 0:
                raise self.corrupt(source, key, f"no chunk {need.number} (written with write_empty_chunks off?)")
        ranges = merge(part.wanted, index, gap=self._gap, most=self._most)
        if whole is None:
            return [(part, found) for found in ranges]
        for found in ranges:
            self._finish(part, found, whole[found.start : found.stop])
        return []

    def _index(self, source: Source, key: str) -> Index:
        meta = source.meta

        def read() -> bytes:
            if meta.index_at_end:
                return self.checked(source, key, lambda: self._store.get_suffix(key, meta.index_bytes))
            return self.checked(source, key, lambda: self._store.get_range(key, 0, meta.index_bytes))

        try:
            return self._parse(meta, read(), None)
        except Damaged:
            try:  # once more: it may have been damaged on the way
                return self._parse(meta, read(), None)
            except Damaged as error:
                raise self.corrupt(source, key, f"shard index: {error}") from error

    def _whole(self, source: Source, key: str) -> tuple[Index, bytes]:
        meta = source.meta

        def read() -> tuple[Index, bytes]:
            data = self.checked(source, key, lambda: self._store.get(key))
            tail = data[-meta.index_bytes :] if meta.index_at_end else data[: meta.index_bytes]
            return self._parse(meta, tail, len(data)), data

        try:
            return read()
        except Damaged:
            try:
                return read()
            except Damaged as error:
                raise self.corrupt(source, key, f"shard index: {error}") from error

    @staticmethod
    def _parse(meta: ArrayMeta, tail: bytes, size: int | None) -> Index:
        return parse_index(tail, math.prod(meta.grid), crc=meta.index_crc, size=size)

    def _fetch(self, item: tuple[_Part, Range]) -> None:
        part, found = item
        source, key = part.request.source, part.key
        data = self.checked(source, key, lambda: self._store.get_range(key, found.start, found.stop))
        self._finish(part, found, data)

    def _finish(self, part: _Part, found: Range, data: bytes) -> None:
        """Check, decode, keep and hand out the chunks of one range."""
        source, key = part.request.source, part.key
        meta = source.meta
        slab = self._slab(source, key)
        for need, start, stop in found.chunks:
            raw = data[start - found.start : stop - found.start]
            try:
                chunk = meta.chain.decode(raw, meta.chunk, self._scratch)
            except Damaged:
                try:  # once more: it may have been damaged on the way
                    raw = self.checked(source, key, lambda a=start, b=stop: self._store.get_range(key, a, b))  # type: ignore[misc]
                    chunk = meta.chain.decode(raw, meta.chunk, self._scratch)
                except Damaged as error:
                    place = f"chunk {need.number}, bytes [{start}, {stop})"
                    raise self.corrupt(source, key, f"{place}: {error}") from error
            _scatter(part.request, need, chunk)
            if slab is not None:
                native = np.ascontiguousarray(chunk, dtype=chunk.dtype.newbyteorder("="))
                slab.write(need.number, native.reshape(-1).view(np.uint8))


def _scatter(request: Request, need: Need, chunk: Array) -> None:
    meta = request.source.meta
    for b in need.boxes:
        into, out_of = overlap(request.boxes[b], need.origin, meta.chunk, meta.shape)
        request.outs[b][into] = chunk[out_of]


class Recent(Generic[T]):
    """A bounded map of the entries used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def peek(self, key: Hashable) -> T | None:
        """The entry, or None."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            return None

    def put(self, key: Hashable, value: T) -> None:
        """Add an entry; the one unused longest goes."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            if len(self._entries) > self._most:
                self._entries.popitem(last=False)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The entry, made where it is missing; two threads may both make it."""
        found = self.peek(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found
