"""Maps computed from published volumes, such as super-pixels: one task a volume, published in one atomic step.

What is computed comes in as a function, so that storage knows nothing of it. A task reads one image, calls the
function, writes the map as int32 beside the image under `labels/<name>/`, and leaves a note below `derive/`: a run that
was killed finds the notes and goes on from there. Images are not touched. The new manifest lists the map; readers of an
earlier manifest see no difference.

Memory of a task: the volume, the map, and what the function takes.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from storage.errors import ConfigError, NotFound, RefusedInput, StoreError
from storage.format.manifest import Manifest, update
from storage.format.records import DerivedRecord, VolumeRecord
from storage.format.volume_writer import write_derived
from storage.ingest.mapping import map_threads
from storage.objects import ByteStore, open_store
from storage.reading.volume_store import VolumeStore

Compute = Callable[[npt.NDArray[Any], VolumeRecord], npt.NDArray[np.int32]]
"""From stored values (C, D, H, W) and the volume's facts to a map (D, H, W); a pure function, picklable by name."""

NOTES = "derive"
READ_THREADS = 4


@dataclass(frozen=True, slots=True)
class DeriveWork:
    """Everything a task needs; picklable."""

    store_url: str
    record: VolumeRecord
    name: str
    recipe: str
    compute: Compute


@dataclass(frozen=True, slots=True)
class DeriveOutcome:
    """The facts of one volume's map, and whether it is an earlier run's."""

    volume_id: str
    content_sha256: str
    derived: DerivedRecord
    reused: bool


@dataclass(frozen=True, slots=True)
class DeriveReport:
    """What a run did.

    Args:
        manifest: The published manifest.
        name: Of the map.
        written: Volumes whose map was computed.
        resumed: Volumes whose map a run that did not get to publishing had made.
        skipped: Volumes that had it already.
        absent: Volumes without it, because they were published while this ran.
        seconds: Wall time.
    """

    manifest: Manifest
    name: str
    written: int
    resumed: int
    skipped: int
    absent: tuple[str, ...]
    seconds: float


class Mapper(Protocol):
    """Maps a module-level function over picklable work and yields results in any order."""

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """See `storage.ingest.mapping.map_threads`."""


def lacking(manifest: Manifest, name: str) -> list[int]:
    """Rows without a map of that name, ascending."""
    without: list[int] = np.setdiff1d(np.arange(len(manifest)), manifest.select(labelled=name)).tolist()
    return without


def run(
    url: str,
    name: str,
    compute: Compute,
    *,
    recipe: str,
    mapper: Mapper = map_threads,
    progress: Callable[[int, int], None] | None = None,
) -> DeriveReport:
    """Compute a map for every volume of the published manifest that has none of that name, and publish.

    Args:
        url: The store.
        name: Of the map; has to change whenever `compute` would give something else.
        compute: See `Compute`.
        recipe: What made it, as text for readers.
        mapper: How tasks are run.
        progress: Called after each volume with volumes done and in all, in the calling thread.

    Raises:
        NotFound: nothing is published at `url`.
        ConfigError: the name is not one, or a label's.
        RefusedInput: a volume is not what `compute` takes; names it. Nothing is published, what is done is kept.
        StoreError: the store cannot be written, or does not give what it should. As above.
    """
    started = time.monotonic()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError("name of a map", expected="letters, digits, dots, hyphens and underscores", found=repr(name))
    store = open_store(url)
    manifest = Manifest.open(store)
    works = [DeriveWork(url, manifest.record(i), name, recipe, compute) for i in lacking(manifest, name)]
    for record in manifest.records():
        if name in (label.name for label in record.labels):
            conflict = f"a label of that name in volume {record.volume_id}"
            raise ConfigError(f"map {name!r}", expected="a name that no label has", found=conflict)
    if not works:
        return DeriveReport(manifest, name, 0, 0, len(manifest), (), time.monotonic() - started)
    _check_writable(store, name)
    outcomes: list[DeriveOutcome] = []
    for outcome in mapper(derive_work, works):
        outcomes.append(outcome)
        if progress is not None:
            progress(len(outcomes), len(works))
    published, absent = publish(store, name, outcomes)
    reused = sum(o.reused for o in outcomes)
    return DeriveReport(
        published,
        name,
        len(outcomes) - reused,
        reused,
        len(manifest) - len(works),
        absent,
        time.monotonic() - started,
    )


def derive_work(work: DeriveWork) -> DeriveOutcome:
    """Compute and write the map of one volume, unless a run before has.

    Raises:
        RefusedInput: the volume is not what the function takes; names the volume.
        StoreError: the store failed.
    """
    store, record = open_store(work.store_url), work.record
    note = f"{NOTES}/{work.name}/{record.volume_id}.json"
    with suppress(NotFound, ValueError, KeyError, TypeError):  # a note that cannot be read costs only the work
        content = json.loads(store.get(note))
        if content["content_sha256"] == record.content_sha256:
            return DeriveOutcome(record.volume_id, record.content_sha256, DerivedRecord(**content["derived"]), True)
    with VolumeStore(work.store_url, Manifest.from_records([record]), threads=READ_THREADS) as volumes:
        stored_CDHW = volumes.read_volume(record.volume_id)
    try:
        map_DHW = work.compute(stored_CDHW, record)
    except RefusedInput as error:
        thing = f"volume {record.volume_id}: {error.thing}"
        raise RefusedInput(thing, expected=error.expected, found=error.found, remedy=error.remedy) from error
    derived = write_derived(store, record, work.name, map_DHW, work.recipe)
    content = {"content_sha256": record.content_sha256, "derived": asdict(derived)}
    store.put(note, json.dumps(content).encode())
    return DeriveOutcome(record.volume_id, record.content_sha256, derived, False)


def publish(store: ByteStore, name: str, outcomes: Iterable[DeriveOutcome]) -> tuple[Manifest, tuple[str, ...]]:
    """Add the maps to the manifest that is published now, in one step; see `storage.format.manifest.update`.

    A volume that was replaced or added meanwhile does not get one.

    Returns:
        The manifest, and the volumes in it that have no map of that name.
    """
    derived_of = {(o.volume_id, o.content_sha256): o.derived for o in outcomes}
    absent: list[str] = []

    def with_maps(latest: Manifest | None) -> Manifest:
        if latest is None:
            raise NotFound(store.url, expected="the data set whose maps were made", found="no object 'latest'")
        records = []
        absent.clear()
        for record in latest.records():
            derived = derived_of.get((record.volume_id, record.content_sha256))
            if derived is not None:
                others = [other for other in record.derived if other.name != name]
                record = replace(record, derived=tuple(sorted([*others, derived], key=lambda d: d.name)))
            records.append(record)
            if name not in record.map_names():
                absent.append(record.volume_id)
        return Manifest.from_records(records, latest.dataset)

    manifest = update(store, with_maps)
    for key in list(store.list(f"{NOTES}/{name}/")):
        with suppress(StoreError):  # leftovers cost a few bytes and are trusted only for the same content
            store.delete(key)
    return manifest, tuple(absent)


def _check_writable(store: ByteStore, name: str) -> None:
    """Fail before the work rather than after it."""
    key = f"{NOTES}/{name}/started"
    try:
        store.put(key, b"")
    except StoreError as error:
        raise StoreError(
            store.url,
            expected=f"a store that can be written, to put {name} beside its images",
            found=error.found,
            remedy="compute it where the store can be written, or on a copy of the store",
        ) from error
