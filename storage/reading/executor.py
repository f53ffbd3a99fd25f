"""Executing a read plan: node cache, shard indexes, merged range requests, checks and decoding, in threads."""

import math
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from storage.errors import CorruptChunk, NotFound, StoreError
from storage.format.batch import BATCH
from storage.format.codecs import Bytes, DamagedError, Scratch, Table
from storage.format.shard_index import Index, parse_index
from storage.format.zarr_metadata import ArrayMeta
from storage.objects import ByteStore, join
from storage.objects.local import FileStore
from storage.reading.node_cache import NodeCache, Slab
from storage.reading.plan import Need, Range, merge, needs, numbers, overlap, shards
from storage.reading.recent import Recent
from storage.reading.request import Request, Source, grid_table, parts_of, unpack_range
from storage.reading.workers import Workers

Array = npt.NDArray[Any]
T = TypeVar("T")
S = TypeVar("S")
INDEXES_KEPT = 4096
SMALL_SHARD = 1 << 20
"""Raw bytes up to which a shard is fetched whole: its index would cost a round trip and save little."""
CORES = len(os.sched_getaffinity(0))
MOST_OF_FILE = 512 << 10
"""As `MOST`, of files, where a further range costs microseconds: the threads that share a crop end together."""
REMEDY = "`tomoscale data verify` lists every damage; restore the object, or ingest into a new store"


@dataclass(frozen=True)
class _Part:
    """Chunks of one shard that a request needs."""

    request: Request
    shard: tuple[int, ...]
    key: str
    chunks: Sequence[Need]

    @cached_property
    def grid(self) -> Table:
        """Where the chunks are, for compiled code."""
        return grid_table(self.request.source.meta, self.shard)


def _chunks(request: Request) -> dict[tuple[int, ...], dict[int, Need]]:
    compiled = BATCH.after(0) is not None and request.targets is not None
    return (numbers if compiled else needs)(request.source.meta, request.boxes)


def _slot(part: _Part) -> Hashable:
    return part.key, part.request.source.content


def _part(request: Request, shard: tuple[int, ...], chunks: Mapping[int, Need]) -> _Part:
    key = f"{request.source.root}/{request.source.meta.shard_key(shard)}"
    return _Part(request, shard, key, list(chunks.values()))


class Executor:
    """Fills requests from a store. Thread-safe.

    Args:
        store: Where the objects are.
        cache: Decoded chunks of this node, or None.
        threads: Requests in flight; each answer is decoded by the thread that fetched it.
        gap, most: See `storage.reading.plan`.
    """

    def __init__(self, store: ByteStore, cache: NodeCache | None, threads: int, gap: int, most: int) -> None:
        self._store, self._cache, self._gap, self._most = store, cache, gap, most
        self._workers, self._closed = Workers(store.url, threads), False
        self._files = store if isinstance(store, FileStore) else None
        if self._files is not None:
            self._most = min(most, MOST_OF_FILE)
        self._indexes: Recent[Index] = Recent(INDEXES_KEPT)
        self._scratch, self._decoded = Scratch(), Scratch()

    def close(self) -> None:
        """End the threads; what was asked of them is finished first, and nothing more is taken."""
        self._closed = True
        self._workers.close()

    def fill(self, requests: Sequence[Request]) -> None:
        """Fill the arrays of every request. Voxels outside a volume are left as they are.

        Raises:
            NotFound: a shard is missing.
            CorruptChunk: an index or a chunk is missing, truncated or altered.
            StoreError: the store did not answer, or is closed.
        """
        if self._closed:
            raise StoreError(self._store.url, expected="an open store", found="a closed one")
        parts = self._parts(requests) if self._cache is None else self._uncached(requests)
        ready = [self._indexes.peek(_slot(part)) is not None for part in parts]
        fetches = [item for part, indexed in zip(parts, ready, strict=True) if indexed for item in self._locate(part)]
        unread = [part for part, indexed in zip(parts, ready, strict=True) if not indexed]
        fetches += [item for items in self.each(self._locate, unread) for item in items]
        if self._files is not None:
            self._workers.together(self._fetch, fetches)
        else:
            self.each(self._fetch, fetches)

    def each(self, work: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """See `Workers.each`."""
        return self._workers.each(work, items)

    def checked(self, source: Source, key: str, call: Callable[[], T]) -> T:
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

    def corrupt(self, source: Source, key: str, damage: str) -> CorruptChunk:
        """The error of a damaged object."""
        return CorruptChunk(
            f"volume {source.volume_id}: {join(self._store.url, key)}",
            expected="what was written",
            found=damage,
            remedy=REMEDY,
        )

    @staticmethod
    def _parts(requests: Sequence[Request]) -> list[_Part]:
        return [_part(request, shard, chunks) for request in requests for shard, chunks in _chunks(request).items()]

    def _uncached(self, requests: Sequence[Request]) -> list[_Part]:
        """Take what the node has; returns the rest."""
        pieces = [
            (request, b, shard)
            for request in requests
            for b, box in enumerate(request.boxes)
            for shard in shards(request.source.meta, box)
        ]
        # Copies are short: more threads than cores would only pass the interpreter's lock around.
        count = min(len(pieces), CORES)
        groups = [pieces[k::count] for k in range(count)]
        absent: dict[tuple[int, tuple[int, ...]], dict[int, Need]] = {}
        for group, answers in zip(groups, self.each(self._copy, groups), strict=True):
            for (request, b, shard), missing in zip(group, answers, strict=True):
                meta = request.source.meta
                for at in missing:
                    chunks = absent.setdefault((id(request), shard), {})
                    number = int(np.ravel_multi_index(at, meta.grid))
                    place = (s * g + a for s, g, a in zip(shard, meta.grid, at, strict=True))
                    origin = [p * c for p, c in zip(place, meta.chunk, strict=True)]
                    part = overlap(request.boxes[b], origin, meta.chunk, meta.shape)
                    chunks.setdefault(number, Need(number)).parts.append((b, *part))
        by_id = {id(request): request for request in requests}
        return [
            _part(request, shard, chunks) for (which, shard), chunks in absent.items() for request in (by_id[which],)
        ]

    def _copy(self, pieces: Sequence[tuple[Request, int, tuple[int, ...]]]) -> list[list[tuple[int, ...]]]:
        """Fill the part of a box that lies in one shard, for each piece; returns the chunks that are absent."""
        answers = []
        for request, b, shard in pieces:
            meta, box = request.source.meta, request.boxes[b]
            origin = tuple(a * s for a, s in zip(shard, meta.shard, strict=True))
            into, inside = overlap(box, origin, meta.shard, meta.shape)
            low, high = [part.start for part in inside], [part.stop for part in inside]
            slab = self._slab(request.source, shard)
            if slab is not None:
                answers.append(slab.read(low, high, request.outs[b][into]))
            else:
                spans = (range(a // c, -(-z // c)) for a, z, c in zip(low, high, meta.chunk, strict=True))
                answers.append(list(product(*spans)))
        return answers

    def _slab(self, source: Source, shard: tuple[int, ...]) -> Slab | None:
        if self._cache is None or not source.content:  # without a digest, other voxels could pass for these
            return None
        meta = source.meta
        # The shard's extent too: cut otherwise, the same volume may have another part of equal size under this key.
        name = f"{join(self._store.url, source.root)}/{meta.shard_key(shard)}|{source.content}|{meta.shard}"
        part = tuple(min(s, n - a * s) for s, n, a in zip(meta.shard, meta.shape, shard, strict=True))
        return self._cache.slab(name, part, meta.chunk, meta.chain.dtype.newbyteorder("="))

    def _locate(self, part: _Part) -> list[tuple[_Part, Range]]:
        """The ranges to fetch of one shard; a small shard is fetched and done with here."""
        source, key = part.request.source, part.key
        meta = source.meta
        index = self._indexes.peek(_slot(part))
        whole: bytes | None = None
        if index is None:
            if math.prod(meta.shard) * meta.chain.dtype.itemsize <= SMALL_SHARD:
                index, whole = self._whole(source, key)
            else:
                index = self._index(source, key)
            self._indexes.put(_slot(part), index)
        for need in part.chunks:
            if index[need.number, 0] < 0:
                raise self.corrupt(source, key, f"no chunk {need.number} (written with write_empty_chunks off?)")
        ranges = merge(part.chunks, index, gap=self._gap, most=self._most)
        if whole is None:
            return [(part, span) for span in ranges]
        for span in ranges:
            self._finish(part, span, np.frombuffer(whole, np.uint8)[span.start : span.stop])
        return []

    def _index(self, source: Source, key: str) -> Index:
        meta = source.meta

        def read() -> bytes:
            if meta.index_at_end:
                return self.checked(source, key, lambda: self._store.get_suffix(key, meta.index_bytes))
            return self.checked(source, key, lambda: self._store.get_range(key, 0, meta.index_bytes))

        try:
            return self._parse(meta, read(), None)
        except DamagedError:
            try:  # once more: it may have been damaged on the way
                return self._parse(meta, read(), None)
            except DamagedError as error:
                raise self.corrupt(source, key, f"shard index: {error}") from error

    def _whole(self, source: Source, key: str) -> tuple[Index, bytes]:
        meta = source.meta

        def read() -> tuple[Index, bytes]:
            data = self.checked(source, key, lambda: self._store.get(key))
            tail = data[-meta.index_bytes :] if meta.index_at_end else data[: meta.index_bytes]
            return self._parse(meta, tail, len(data)), data

        try:
            return read()
        except DamagedError:
            try:
                return read()
            except DamagedError as error:
                raise self.corrupt(source, key, f"shard index: {error}") from error

    @staticmethod
    def _parse(meta: ArrayMeta, tail: bytes, size: int | None) -> Index:
        index = parse_index(tail, math.prod(meta.grid), crc=meta.index_crc, size=size)
        # No codec makes a chunk much longer than it was; what an index without checksum claims would fill the memory.
        if (index[:, 1] > 2 * math.prod(meta.chunk) * meta.chain.dtype.itemsize + (1 << 16)).any():
            raise DamagedError("an index entry longer than a chunk can be")
        return index

    def _fetch(self, item: tuple[_Part, Range]) -> float:
        """Read one range and be done with it; returns the seconds that it was waited for."""
        part, span = item
        before = time.perf_counter()
        data = self.checked(part.request.source, part.key, lambda: self._bytes(part.key, span.start, span.stop))
        wait_s = time.perf_counter() - before
        self._finish(part, span, data)
        return wait_s

    def _bytes(self, key: str, start: int, stop: int) -> Bytes:
        """Bytes of an object, in memory that may be this thread's next ones' too."""
        if self._files is None:
            return np.frombuffer(self._store.get_range(key, start, stop), np.uint8)
        # At most `MOST_OF_FILE` or one chunk a thread.
        data = self._scratch.take(stop - start)
        self._files.read_into(key, start, data.data)
        return data

    def _finish(self, part: _Part, span: Range, data: Bytes) -> None:
        """Check, decode, keep and hand out the chunks of one range."""
        source, key = part.request.source, part.key
        meta = source.meta
        slab = self._slab(source, part.shard)
        unpack = BATCH.after(len(span.chunks)) if slab is None else None
        if unpack is not None:
            decoded = self._decoded.take(math.prod(meta.chunk) * meta.chain.dtype.itemsize)
            if unpack_range(unpack, part.request, part.grid, span, data, decoded):
                return
            # One by one, which finds what is wrong and reads it once more.
        outs = part.request.outs
        for need, start, stop in span.chunks:
            raw = data[start - span.start : stop - span.start]
            try:
                chunk = meta.chain.decode(raw, meta.chunk)
            except DamagedError:
                try:  # once more: it may have been damaged on the way
                    again = self.checked(source, key, partial(self._store.get_range, key, start, stop))
                    chunk = meta.chain.decode(again, meta.chunk)
                except DamagedError as error:
                    place = f"chunk {need.number}, bytes [{start}, {stop})"
                    raise self.corrupt(source, key, f"{place}: {error}") from error
            for b, into, out_of in need.parts or parts_of(part.request, part.shard, need.number):
                outs[b][into] = chunk[out_of]
            if slab is not None:
                slab.write(tuple(int(i) for i in np.unravel_index(need.number, meta.grid)), chunk)
