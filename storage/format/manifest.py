"""The list of volumes with their facts: one row a volume in `manifest-<fingerprint>.parquet`.

A volume that is not in the manifest does not exist. The object `latest` holds the fingerprint of the manifest to use;
it is replaced in one step after the manifest itself is in place, so that readers see the old or the new one. Jobs
publish by `update`, which replaces the pointer only if it is still the one that was read: what another job published
meanwhile is merged, not lost.

A manifest of a million volumes opens by its footer alone: rows are read in groups when a record is asked for, and what
a start asks of every row (split, names of labels, stored type and channels) travels compressed in the footer.
"""

import base64
import hashlib
import io
import json
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from cachetools import LRUCache

from storage.errors import ConfigError, CorruptChunk, NotFound, StoreError
from storage.format.manifest_rows import SCHEMA, from_row, to_row
from storage.format.records import VolumeRecord
from storage.format.sealed_parquet import SealedParquet, seal
from storage.objects import ByteStore, open_store

POINTER = "latest"
MOST_TRIES = 50
"""Of one publication; each failed one means that another job published."""
ROWS_PER_GROUP = 256
"""Rows that are decoded to read one. Fewer make a footer that takes longer to open: 17 MB for a million volumes now."""
COMPRESSION = "lz4"
"""zstd would make a manifest a fifth smaller and a group take four times as long to decode, most of it setting up."""
WHOLE_BYTES = 8 << 20  # a manifest up to this size is fetched in one request
GROUPS_KEPT = 256
FORMAT = "1"


class Manifest:
    """A published or newly made list of volumes, in order of `volume_id`."""

    def __init__(self, file: SealedParquet, thing: str, data: bytes | None = None) -> None:
        """Use `open`, `from_records` or `from_bytes`."""
        self._file, self._thing, self._bytes = file, thing, data
        try:
            form = file.notes["tomoscale.format"].decode()
            self.fingerprint: str = file.notes["tomoscale.fingerprint"].decode()
            self.dataset: dict[str, Any] = json.loads(file.notes["tomoscale.dataset"])
            self._split_codes, self._splits = _unpack(file.notes["tomoscale.splits"])
            self._label_codes, self._label_sets = _unpack(file.notes["tomoscale.labels"])
            self._kinds = _unpack(file.notes["tomoscale.kinds"]) if "tomoscale.kinds" in file.notes else None
            self._first: list[str] = json.loads(file.notes["tomoscale.first"])
        except (KeyError, ValueError, zlib.error) as error:
            raise CorruptChunk(
                thing, expected="a manifest of this project", found=f"{type(error).__name__}: {str(error)[:200]}"
            ) from error
        if form != FORMAT:
            raise CorruptChunk(
                thing,
                expected=f"a manifest of format {FORMAT}",
                found=f"format {form[:20]}",
                remedy="read it with the version of this project that wrote it, or ingest again into an empty store",
            )
        self._rows, self._per_group = file.rows, file.rows_per_group
        self._groups: LRUCache[int, pa.Table] = LRUCache(GROUPS_KEPT)
        self._lock = threading.Lock()

    @classmethod
    def from_records(cls, records: Iterable[VolumeRecord], dataset: Mapping[str, Any] | None = None) -> "Manifest":
        """Make a manifest; the order of `records` does not matter.

        Args:
            dataset: JSON-able facts of the whole data set, its name among them.

        Raises:
            ConfigError: two records share a volume_id.
        """
        ordered = sorted(records, key=lambda record: record.volume_id)
        for one, two in pairwise(ordered):
            if one.volume_id == two.volume_id:
                raise ConfigError(f"volume {one.volume_id}", expected="one record", found="two")
        return cls.from_bytes(_to_parquet(ordered, dict(dataset or {})), "a new manifest")

    @classmethod
    def from_bytes(cls, data: bytes, thing: str = "manifest") -> "Manifest":
        """Open the bytes of a manifest file."""
        return cls(SealedParquet(lambda start, stop: data[start:stop], len(data), thing), thing, data)

    @classmethod
    def open(cls, url: str | ByteStore, fingerprint: str | None = None) -> "Manifest":
        """Open the published manifest of a store, or an earlier one by its fingerprint.

        Raises:
            NotFound: nothing is published there, or not that fingerprint.
            CorruptChunk: the manifest is damaged or is not the one its name says.
        """
        store = open_store(url) if isinstance(url, str) else url
        if fingerprint is None:
            try:
                fingerprint = store.get(POINTER).decode("ascii", "replace").strip()
            except NotFound as error:
                raise NotFound(
                    f"{store.url}",
                    expected="a published data set",
                    found="no object 'latest'",
                    remedy="ingest into it first",
                ) from error
            if not fingerprint or not fingerprint.isalnum():
                raise CorruptChunk(f"{store.url}/{POINTER}", expected="a fingerprint", found=repr(fingerprint[:40]))
            try:
                return cls._named(store, fingerprint)
            except NotFound as error:
                # Taken for "nothing published", the next job would publish its own volumes and no others.
                raise CorruptChunk(
                    error.thing, expected=f"the manifest that {POINTER!r} names", found="no such object"
                ) from error
        return cls._named(store, fingerprint)

    @classmethod
    def _named(cls, store: ByteStore, fingerprint: str) -> "Manifest":
        thing = f"{store.url}/{manifest_key(fingerprint)}"
        try:
            manifest = cls._fetch(store, fingerprint, thing)
        except CorruptChunk:
            manifest = cls._fetch(store, fingerprint, thing)  # once more: it may have been damaged on the way
        if manifest.fingerprint != fingerprint:
            raise CorruptChunk(thing, expected=f"fingerprint {fingerprint}", found=manifest.fingerprint)
        return manifest

    @classmethod
    def _fetch(cls, store: ByteStore, fingerprint: str, thing: str) -> "Manifest":
        key = manifest_key(fingerprint)
        size = store.head(key)
        if size <= WHOLE_BYTES:
            manifest = cls.from_bytes(store.get(key), thing)
            manifest._file.check()  # now, while the object can still be fetched again
            return manifest
        return cls(SealedParquet(partial(store.get_range, key), size, thing), thing)

    def write(self, store: ByteStore) -> str:
        """Publish, whatever was published before: the manifest first, then the pointer. Returns the fingerprint.

        For a store that nobody else writes; jobs use `update`.
        """
        self._put(store)
        store.put(POINTER, self.fingerprint.encode())
        return self.fingerprint

    def write_aside(self, store: ByteStore) -> str:
        """Write the manifest and leave the pointer: it opens by its fingerprint alone, which is returned."""
        self._put(store)
        return self.fingerprint

    def _put(self, store: ByteStore) -> None:
        if self._bytes is None:
            raise StoreError(self._thing, expected="a manifest made by from_records", found="one opened from a store")
        store.put(manifest_key(self.fingerprint), self._bytes)

    def __len__(self) -> int:
        return self._rows

    def record(self, i: int) -> VolumeRecord:
        """The facts of volume i (negative counts from the end).

        Raises:
            IndexError: no such row.
            CorruptChunk: the row's group is damaged.
        """
        row = i + self._rows if i < 0 else int(i)
        if not 0 <= row < self._rows:
            raise IndexError(f"record {i} of {self._rows}")
        table = self._group(row // self._per_group)
        return from_row(table.slice(row % self._per_group, 1).to_pylist()[0])

    def records(self) -> Iterable[VolumeRecord]:
        """Every record in order, a group in memory at a time."""
        for g in range(self._file.groups):
            yield from map(from_row, self._group(g).to_pylist())

    def index_of(self, volume_id: str) -> int:
        """The row of a volume.

        Raises:
            NotFound: no such volume.
        """
        low = bisect_right(self._first, volume_id)
        if low:
            ids: list[str] = self._group(low - 1).column("volume_id").to_pylist()
            if volume_id in ids:
                return (low - 1) * self._per_group + ids.index(volume_id)
        raise NotFound(f"volume {volume_id}", expected=f"a volume of {self._thing}", found="none of that name")

    def select(self, split: str | None = None, labelled: str | None = None) -> npt.NDArray[np.int64]:
        """Rows of a split, and with a label or derived map of that name, ascending."""
        keep = np.ones(self._rows, dtype=bool)
        if split is not None:
            keep &= np.isin(self._split_codes, [i for i, s in enumerate(self._splits) if s == split])
        if labelled is not None:
            keep &= np.isin(self._label_codes, [i for i, s in enumerate(self._label_sets) if labelled in s])
        return np.flatnonzero(keep).astype(np.int64)

    def kinds(self) -> tuple[npt.NDArray[np.uint32], list[tuple[str, int]]]:
        """Which of the pairs (stored type, channels) each row is, (N,), and these pairs.

        From the footer; a manifest of before has none there, and all of it is read.
        """
        if self._kinds is None:
            rows = list(zip(self.column("dtype"), self.column("channels"), strict=True))
            pairs = sorted(set(rows))
            code = {pair: i for i, pair in enumerate(pairs)}
            self._kinds = np.array([code[row] for row in rows], dtype=np.uint32), pairs
        codes, names = self._kinds
        return codes, [(str(dtype), int(channels)) for dtype, channels in names]

    def label_names(self) -> tuple[str, ...]:
        """Every label or derived map that some volume has, sorted."""
        return tuple(sorted({name for names in self._label_sets for name in names}))

    def subjects(self) -> tuple[str, ...]:
        """The subject of every row."""
        return tuple(self.column("subject"))

    def column(self, name: str) -> list[Any]:
        """One field of every record, in order; reads the whole manifest."""
        values: list[Any] = []
        for g in range(self._file.groups):
            values += self._file.group(g, [name]).column(name).to_pylist()
        return values

    def _group(self, g: int) -> pa.Table:
        with self._lock:
            table = self._groups.get(g)
        if table is None:
            table = self._file.group(g)
            with self._lock:
                self._groups[g] = table
        return table


def update(store: ByteStore, make: Callable[[Manifest | None], Manifest]) -> Manifest:
    """Publish what `make` makes of the manifest that is published (None: there is none).

    The pointer is replaced only if it is still what was read. Where another job was faster, `make` is called again,
    with that job's manifest: nothing that was published in between is lost, and nothing is published half.

    Raises:
        CorruptChunk: what is published is damaged.
        StoreError: the store failed, or others published `MOST_TRIES` times meanwhile. Nothing is published then.
    """
    for _ in range(MOST_TRIES):
        try:
            pointer: bytes | None = store.get(POINTER)
        except NotFound:
            pointer = None
        latest = None if pointer is None else Manifest.open(store)
        if (
            latest is not None
            and pointer is not None
            and latest.fingerprint != pointer.decode("ascii", "replace").strip()
        ):
            continue
        manifest = make(latest)
        if latest is not None and manifest.fingerprint == latest.fingerprint:
            return latest
        manifest._put(store)
        if store.swap(POINTER, manifest.fingerprint.encode(), pointer):
            return manifest
    raise StoreError(
        f"{store.url}/{POINTER}",
        expected="to publish",
        found=f"that other jobs published first, {MOST_TRIES} times",
        remedy="nothing is lost: run it again when they are done",
    )


def manifest_key(fingerprint: str) -> str:
    """Object name of a manifest."""
    return f"manifest-{fingerprint}.parquet"


def fingerprint_of(records: Iterable[VolumeRecord], dataset: Mapping[str, Any]) -> str:
    """First 32 hex digits of a SHA-256 over the records in order of volume_id, and the data set's facts."""
    return _fingerprint((to_row(record) for record in sorted(records, key=lambda r: r.volume_id)), dataset)


def _fingerprint(rows: Iterable[dict[str, Any]], dataset: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(_canonical({"format": FORMAT, "dataset": dict(dataset)}))
    for row in rows:
        digest.update(b"\n" + _canonical(row))
    return digest.hexdigest()[:32]


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _to_parquet(records: list[VolumeRecord], dataset: dict[str, Any]) -> bytes:
    splits = sorted({r.split for r in records})
    sets = sorted({r.map_names() for r in records})
    split_code = {s: i for i, s in enumerate(splits)}
    set_code = {s: i for i, s in enumerate(sets)}
    kinds = sorted({(r.dtype, r.channels) for r in records})
    kind_code = {kind: i for i, kind in enumerate(kinds)}
    meta = {
        "tomoscale.format": FORMAT,
        "tomoscale.fingerprint": _fingerprint(map(to_row, records), dataset),
        "tomoscale.dataset": _canonical(dataset),
        "tomoscale.splits": _pack([split_code[r.split] for r in records], splits),
        "tomoscale.labels": _pack([set_code[r.map_names()] for r in records], sets),
        "tomoscale.kinds": _pack([kind_code[r.dtype, r.channels] for r in records], kinds),
        "tomoscale.first": json.dumps([r.volume_id for r in records[::ROWS_PER_GROUP]]),
    }
    schema = SCHEMA.with_metadata(meta)
    out = io.BytesIO()
    with pq.ParquetWriter(out, schema, compression=COMPRESSION) as writer:
        for at in range(0, len(records), ROWS_PER_GROUP):
            # Rows are made twice, here and for the fingerprint: those of a million volumes together take gigabytes.
            rows = [to_row(record) for record in records[at : at + ROWS_PER_GROUP]]
            table = pa.Table.from_pylist(rows, schema=schema)
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
    return seal(out.getvalue())


def _pack(codes: list[int], names: list[Any]) -> bytes:
    packed = zlib.compress(np.asarray(codes, dtype="<u4").tobytes(), 6)
    return _canonical({"names": names, "codes": base64.b64encode(packed).decode()})


def _unpack(text: bytes) -> tuple[npt.NDArray[np.uint32], list[Any]]:
    data = json.loads(text)
    codes: npt.NDArray[np.uint32] = np.frombuffer(zlib.decompress(base64.b64decode(data["codes"])), dtype="<u4")
    return codes, list(data["names"])
