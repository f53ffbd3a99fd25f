"""From a folder of scans to a published store: one task a volume, published in one atomic step at the end.

`run` finds the volumes, maps `ingest_work` over them (threads here, Ray tasks in `jobs.ingest`), and publishes. A task
reads one volume, brings it to canonical axes and the wanted spacing, measures its facts, writes it, and leaves a record
under `ingest/`: a run that was killed finds these records and goes on from there, and a volume whose source and policy
are in the published manifest is not touched again. Refused volumes are listed in `quarantine.jsonl` and the rest goes
on; nothing is ever put in a volume's place. Published volumes are never rewritten: what changed gets a new id. Several
jobs may write to one store at the same time: see `storage.ingest.claims.claim` and `storage.ingest.publish`.

Memory of a task: at most about 26 bytes a voxel of the larger of source and resampled volume (source, float work
copies, percentile copy, stored int16, label); `ReadPolicy.max_voxels` bounds it.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from storage.errors import NotFound, RefusedInput, StoreError
from storage.format.layout import choose_layout
from storage.format.manifest import Manifest
from storage.format.records import VolumeRecord
from storage.format.volume import Membership, Provenance, Volume
from storage.format.volume_writer import content_sha256, write_volume
from storage.ingest.claims import (
    HIDDEN,
    base_id,
    claim,
    content_tag,
    hides,
    record_source,
    recorded,
    side_key,
)
from storage.ingest.dataset_facts import dataset_facts
from storage.ingest.deidentify import Pseudonyms, load_salt
from storage.ingest.discover import discover
from storage.ingest.items import Discovery, IngestItem, Orphan
from storage.ingest.label_like import check_told
from storage.ingest.mapping import HERE, map_threads
from storage.ingest.names.table import with_columns
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import prepare
from storage.ingest.publish import check_subjects, publish
from storage.ingest.quarantine import (
    QUARANTINE,
    Origin,
    Quarantined,
    by_reason,
    origin_of,
    read_quarantine,
    reason_of,
    write_keys,
    write_quarantine,
)
from storage.ingest.source_digest import source_digest, source_state
from storage.objects import ByteStore, open_store
from storage.objects.fsync import file_system_of, unforced


@dataclass(frozen=True, slots=True)
class Work:
    """Everything a task needs; picklable. The salt inside is hidden from `repr`."""

    item: IngestItem
    volume_id: str
    source: str
    subject: str
    study: str
    store_url: str
    policy: IngestPolicy
    modality: str = ""
    published: tuple[VolumeRecord, ...] = ()
    """What is published of its source."""
    resumed: bool = True
    """Whether an earlier run may have left a record of it."""
    unforced: int | None = None
    """The file system that the run forces to the disk before it publishes, so that the task need not."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one volume: a record, or a refusal."""

    record: VolumeRecord | None
    refused: Quarantined | None
    skipped: bool
    bytes_in: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; passed to the callback after each volume."""

    done: int
    total: int
    skipped: int
    refused: int
    bytes_in: int
    seconds: float

    @property
    def mb_per_s(self) -> float:
        """Source bytes read per second, in 1e6 bytes."""
        return self.bytes_in / 1e6 / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """At the pace so far."""
        return self.seconds / max(self.done, 1) * (self.total - self.done)


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What a run did. `published` counts volumes in the manifest, `skipped` those that were there already."""

    published: int
    written: int
    skipped: int
    quarantined: tuple[Quarantined, ...]
    orphans: tuple[Orphan, ...]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]
    manifest: Manifest
    bytes_in: int
    seconds: float


class Mapper(Protocol):
    """Maps a module-level function over picklable work and yields results in any order."""

    def __call__(self, function: Callable[[Work], Outcome], items: Iterable[Work]) -> Iterator[Outcome]:
        """See `map_threads` for the plain case."""


def run(
    src: str,
    dst: str,
    policy: IngestPolicy | None = None,
    *,
    mapper: Mapper = map_threads,
    progress: Callable[[Progress], None] | None = None,
    discovered: Callable[[Discovery], None] | None = None,
    refusals: Callable[[Sequence[Quarantined]], None] | None = None,
    append: bool = False,
    name: str = "",
    pseudonyms: Pseudonyms | None = None,
) -> IngestReport:
    """Ingest a folder and publish it.

    Args:
        src: Folder (or file) of volumes.
        dst: URL of the store.
        policy: See `IngestPolicy`.
        mapper: How tasks are run.
        progress: Called after each volume, in the calling thread.
        discovered: Called with what the folder holds, before anything is read.
        refusals: Called with the refused volumes, where there are any, however the run ends.
        append: Keep published volumes that `src` does not hold; otherwise the new manifest is `src` and nothing else.
        name: Of the data set; the last part of the URL when empty.
        pseudonyms: Salt of identifiers; the user's (`load_salt`) when None and needed.

    Raises:
        ConfigError: `src` does not exist.
        RefusedInput: nothing to ingest, too few subjects, or more refused than the policy allows. Nothing is published.
        StoreError: the store does not take or give what it should. Nothing is published.
    """
    policy = policy or IngestPolicy()
    started = time.monotonic()
    discovery = discover(src, policy.subject_pattern, policy.subject_table)
    if discovered is not None:
        discovered(discovery)
    store = open_store(dst)
    before = _published(store)
    refused_before = read_quarantine(store)[1]
    if pseudonyms is None and any(hides(item, policy) for item in discovery.items):
        pseudonyms = load_salt(store.url, used=any(record.source.startswith(HIDDEN) for record in before))
    facts = dataset_facts(discovery.root, name or dst.rstrip("/").rpartition("/")[2])
    works = _plan(discovery.items, dst, policy, pseudonyms, before, facts.modality)
    refused = [_clash(orphan, policy, pseudonyms, discovery.root) for orphan in discovery.refused]
    outcomes: list[Outcome] = []
    try:
        subjects = [item.subject for item in discovery.items]
        check_subjects(src, subjects, 1 if append else policy.min_subjects, refused)
        resumed = any(True for _ in store.list("ingest/"))
        with file_system_of(store) as disk:
            device = disk.device if disk is not None and mapper in HERE else None
            works = [replace(work, resumed=resumed, unforced=device) for work in works]
            for outcome in mapper(ingest_work, works):
                outcomes.append(outcome)
                if outcome.refused is not None:
                    refused.append(outcome.refused)
                if progress is not None:
                    progress(_progress(outcomes, len(works), time.monotonic() - started))
            if disk is not None:  # also for what an earlier run wrote and did not get to force
                disk.sync()
    finally:
        refused.sort(key=lambda q: q.source)
        write_keys(store.url, refused, refused_before)
        if refused and refusals is not None:
            refusals(refused)
    records = [o.record for o in outcomes if o.record]
    stale = {work.source for work in works} | (set() if append else set(refused_before))
    write_quarantine(store, refused, stale)
    if len(refused) > policy.max_failed * (len(works) + len(discovery.refused)):
        raise RefusedInput(
            src,
            expected=f"at most {policy.max_failed:.0%} of the volumes refused",
            found=f"{len(refused)} of {len(works) + len(discovery.refused)}: {'; '.join(by_reason(refused))}",
            remedy=f"see {QUARANTINE} in the store; repair them, or raise max_failed",
        )
    manifest, warnings = publish(store, records, policy, facts.dataset, before, append=append, refused=refused)
    _drop_side_records(store, records)
    return IngestReport(
        published=len(manifest),
        written=sum(o.record is not None and not o.skipped for o in outcomes),
        skipped=sum(o.skipped for o in outcomes),
        quarantined=tuple(refused),
        orphans=discovery.orphans,
        ignored=discovery.ignored,
        warnings=(*warnings, *discovery.notes),
        manifest=manifest,
        bytes_in=sum(o.bytes_in for o in outcomes),
        seconds=time.monotonic() - started,
    )


def ingest_work(work: Work) -> Outcome:
    """Ingest one volume; a refusal is an outcome, a fault of the store is raised."""
    try:
        record, skipped = ingest_item(work)
    except RefusedInput as error:
        return _refused(work, reason_of(error, work.item, work.policy))
    return Outcome(record, None, skipped, 0 if skipped else size_of(work.item))


def _refused(work: Work, reason: str) -> Outcome:
    refused = Quarantined(work.item.source, work.source, reason, origin_of(work.item))
    return Outcome(None, refused, False, size_of(work.item))


def unread(work: Work, how: str) -> Outcome:
    """The refusal of a volume whose task never ended: the others go on."""
    reason = (
        f"expected a process that ends; found it killed each time, {how}; "
        "lower read.max_voxels, give its node more memory, or convert the file"
    )
    return _refused(work, reason)


def ingest_item(work: Work) -> tuple[VolumeRecord, bool]:
    """Write one volume unless the store has it.

    Returns:
        The record, its split still open, and whether nothing had to be written.

    Raises:
        RefusedInput: the volume or its label is refused; nothing of it is left that a manifest could name.
        StoreError: the store failed.
    """
    state, policy = source_state(work.item), work.policy
    digest, version = source_digest(work.item), policy.version
    store = unforced(open_store(work.store_url), work.unforced)
    earlier = next((r for r in work.published if (r.source_sha256, r.policy) == (digest, version)), None)
    if earlier is None and work.resumed:
        earlier = recorded(store, work.volume_id, digest, version)
    if earlier is not None:
        check_told(work.item.source, earlier.notes, policy)
        return _of_this_run(earlier, work), True
    ready = prepare(work.item, policy, work.modality)
    if source_state(work.item) != state:  # or the digest would be of other bytes than the voxels
        raise RefusedInput(
            work.item.source,
            expected="files that nobody writes while they are read",
            found="one that changed meanwhile",
            remedy="run it again when they are complete",
        )
    sidecar = claim(store, work.volume_id, digest, version)
    shape = ready.stored_CDHW.shape
    layout = choose_layout(
        (shape[1], shape[2], shape[3]), policy.crop_DHW, itemsize=ready.stored_CDHW.dtype.itemsize, channels=shape[0]
    )
    if ready.label_DHW is not None:
        ready.notes.append(f"image_sha256={content_sha256(ready.stored_CDHW)}")
    record = write_volume(
        store,
        sidecar.volume_id,
        Volume(
            ready.stored_CDHW,
            spacing_mm=ready.spacing_mm,
            affine=ready.affine,
            labels={} if ready.label_DHW is None else {policy.label_name: ready.label_DHW},
            scale=ready.scale,
            offset=ready.offset,
            stats=ready.stats,
            foreground=ready.foreground,
            modality=ready.modality,
        ),
        membership=Membership(subject=work.subject, study=work.study),
        provenance=Provenance(
            orientation=ready.orientation,
            source=work.source,
            source_sha256=digest,
            reader=ready.reader,
            policy=version,
            notes=ready.notes,
        ),
        layout=layout,
    )
    replace(sidecar, record=record, forced=work.unforced is None).save(store)
    return _of_this_run(record, work), False


def _of_this_run(record: VolumeRecord, work: Work) -> VolumeRecord:
    """The record with what a later run may say otherwise: whose it is, and what a subject table adds."""
    columns = () if hides(work.item, work.policy) else work.item.columns
    notes = with_columns(record.notes, columns)
    return replace(record, subject=work.subject, study=work.study, notes=notes)


def _clash(orphan: Orphan, policy: IngestPolicy, pseudonyms: Pseudonyms | None, root: str) -> Quarantined:
    """The refusal of a file that no item was made of, since another claims its name."""
    if policy.identifiers != "hash" or pseudonyms is None:
        return Quarantined(orphan.source, orphan.source, orphan.what)
    reason = "expected one file for one name; found others as well; remove or rename one of them"
    stored = f"{HIDDEN}{pseudonyms.of('source', orphan.source)}"
    return Quarantined(orphan.source, stored, reason, Origin(str(Path(root, orphan.source))))


def _drop_side_records(store: ByteStore, records: Iterable[VolumeRecord]) -> None:
    """Delete those of published volumes, which need none. Those of other jobs are their claims, and stay."""
    keys = {side_key(record.volume_id) for record in records}
    for key in [key for key in store.list("ingest/") if key in keys]:
        with suppress(StoreError):  # leftovers cost a few bytes and are read again only by the same source and policy
            store.delete(key)


def _plan(
    items: Sequence[IngestItem],
    dst: str,
    policy: IngestPolicy,
    pseudonyms: Pseudonyms | None,
    published: Iterable[VolumeRecord],
    modality: str,
) -> list[Work]:
    works, used = [], {}
    by_source: defaultdict[str, tuple[VolumeRecord, ...]] = defaultdict(tuple)
    for record in published:  # two folders of one store may hold files of one name
        by_source[record.source] += (record,)
    for item in items:
        source = record_source(item, policy, pseudonyms)
        volume_id = base_id(item, policy, pseudonyms)
        if volume_id in used:  # two names that differ only in characters an id cannot have
            volume_id = f"{volume_id}-{content_tag(source, item.name)}"
        used[volume_id] = source
        hide = hides(item, policy)
        subject = pseudonyms.of("subject", item.subject) if hide and pseudonyms else item.subject
        study = pseudonyms.of("study", item.study) if hide and pseudonyms and item.study else item.study
        works.append(Work(item, volume_id, source, subject, study, dst, policy, modality, by_source.get(source, ())))
    return works


def _published(store: ByteStore) -> tuple[VolumeRecord, ...]:
    try:
        return tuple(Manifest.open(store).records())
    except NotFound:
        return ()


def _progress(outcomes: Sequence[Outcome], total: int, seconds: float) -> Progress:
    return Progress(
        len(outcomes),
        total,
        sum(o.skipped for o in outcomes),
        sum(o.refused is not None for o in outcomes),
        sum(o.bytes_in for o in outcomes),
        seconds,
    )


def size_of(item: IngestItem) -> int:
    """Bytes of the files of an item."""
    size = 0
    for path in item.files:
        with suppress(OSError):
            size += Path(path).stat().st_size
    return size
