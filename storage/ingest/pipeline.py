"""From a folder of scans to a published store: one task a volume, published in one atomic step at the end.

`run` finds the volumes, maps `ingest_work` over them (threads here, Ray tasks in `jobs.ingest`), and publishes. A task
reads one volume, brings it to canonical axes and the wanted spacing, measures its facts, writes it, and leaves a record
under `ingest/`: a run that was killed finds these records and goes on from there, and a volume whose source and policy
are in the published manifest is not touched again. Refused volumes are listed in `quarantine.jsonl` and the rest goes
on; nothing is ever put in a volume's place. Published volumes are never rewritten: what changed gets a new id. Several
jobs may write to one store at the same time: see `storage.ingest.publishing`.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from threadpoolctl import threadpool_limits

from storage.errors import NotFound, RefusedInput, StoreError
from storage.format.manifest import Manifest
from storage.format.records import VolumeRecord
from storage.ingest.dataset_facts import dataset_facts
from storage.ingest.deidentify import Pseudonyms, load_salt
from storage.ingest.discover import discover
from storage.ingest.items import Discovery, IngestItem, Orphan
from storage.ingest.mapping import HERE, map_threads
from storage.ingest.policy import IngestPolicy
from storage.ingest.publishing.claims import (
    HIDDEN,
    base_id,
    content_tag,
    hides,
    record_source,
    side_key,
)
from storage.ingest.publishing.publish import check_subjects, publish
from storage.ingest.publishing.quarantine import (
    QUARANTINE,
    Origin,
    Quarantined,
    by_reason,
    read_quarantine,
    write_keys,
    write_quarantine,
)
from storage.ingest.work import Outcome, Work, ingest_work
from storage.objects import ByteStore, open_store
from storage.objects.fsync import file_system_of


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
        # A volume has a thread of its own; those of BLAS would spend half of the time waiting for each other.
        with threadpool_limits(1, "blas"), file_system_of(store) as disk:
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
