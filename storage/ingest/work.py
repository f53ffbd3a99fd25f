"""The task of one volume: read, prepared, written under a claimed name, and what became of it.

Memory of a task: at most about 26 bytes a voxel of the larger of source and resampled volume (source, float work
copies, percentile copy, stored int16, label); `ReadPolicy.max_voxels` bounds it.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, replace

from storage.errors import RefusedInput
from storage.format.layout import choose_layout
from storage.format.records import VolumeRecord
from storage.format.volume import Membership, Provenance, Volume
from storage.format.volume_writer import content_digests, write_volume
from storage.ingest.items import IngestItem
from storage.ingest.label_like import check_told
from storage.ingest.label_tables import label_names, with_label_names
from storage.ingest.names.table import with_columns
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import prepare
from storage.ingest.publishing.claims import claim, hides, recorded
from storage.ingest.publishing.quarantine import Quarantined, origin_of, reason_of
from storage.ingest.source_digest import source_digest, source_state
from storage.objects import open_store
from storage.objects.fsync import unforced


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
    labels = {} if ready.label_DHW is None else {policy.label_name: ready.label_DHW}
    image, content = content_digests(ready.stored_CDHW, labels)
    if labels:
        ready.notes.append(f"image_sha256={image}")
    record = write_volume(
        store,
        sidecar.volume_id,
        Volume(
            ready.stored_CDHW,
            spacing_mm=ready.spacing_mm,
            affine=ready.affine,
            labels=labels,
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
        content=content,
    )
    replace(sidecar, record=record, forced=work.unforced is None).save(store)
    return _of_this_run(record, work), False


def _of_this_run(record: VolumeRecord, work: Work) -> VolumeRecord:
    """The record with what a later run may say otherwise: whose it is, and what tables of subjects and labels add."""
    columns = () if hides(work.item, work.policy) else work.item.columns
    values = [value for label in record.labels for value in label.values]
    names = label_names(work.item, values, record.notes)
    notes = with_columns(with_label_names(record.notes, names), columns)
    return replace(record, subject=work.subject, study=work.study, notes=notes)


def size_of(item: IngestItem) -> int:
    """Bytes of the files of an item."""
    size = 0
    for path in item.files:
        with suppress(OSError):
            size += os.stat(path).st_size
    return size
