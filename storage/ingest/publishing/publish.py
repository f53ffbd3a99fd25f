"""Publishing an ingest: its volumes on top of what the store holds, in one step that no other job can undo.

Another job may have published since the run began, or be about to. `storage.format.manifest.update` reads what is
published, merges, and replaces the pointer only if nobody else did meanwhile; who comes second merges again. So:

- an append adds its volumes to whatever is published at that moment;
- an ingest replaces the volumes that were published when it began, and leaves in place, with a warning, those that
  another job published since: who does not want them runs it again;
- maps that were computed meanwhile stay with their volumes, and published subjects keep their split.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from storage.errors import RefusedInput
from storage.format.manifest import Manifest, update
from storage.format.records import VolumeRecord
from storage.ingest.names.subjects import EACH_FILE
from storage.ingest.policy import IngestPolicy
from storage.ingest.publishing import splits
from storage.ingest.publishing.claims import image_digest
from storage.ingest.publishing.class_names import with_class_names
from storage.ingest.publishing.near_copies import near_copies_note
from storage.ingest.publishing.quarantine import Quarantined, by_reason
from storage.objects import ByteStore


def publish(
    store: ByteStore,
    records: Sequence[VolumeRecord],
    policy: IngestPolicy,
    dataset: Mapping[str, Any],
    before: Sequence[VolumeRecord] = (),
    *,
    append: bool = False,
    refused: Sequence[Quarantined] = (),
) -> tuple[Manifest, tuple[str, ...]]:
    """Assign splits, note duplicates, check for leaks, and replace the manifest in one step.

    Args:
        records: The volumes of this run, their splits still open.
        dataset: Facts of the data set.
        before: What was published when the run began.
        append: Keep those too.
        refused: What this run refused: named where too few subjects are left.

    Returns:
        The manifest and what a reader should know about it.

    Raises:
        RefusedInput: too few subjects, volumes that cannot be split without a leak, or another job published other
            content under an id of this one. Nothing is published.
        StoreError: the store failed. As above.
    """
    warnings: list[str] = []
    replaced = set() if append else {record.volume_id for record in before}

    def merged(latest: Manifest | None) -> Manifest:
        warnings.clear()
        published = () if latest is None else tuple(latest.records())
        own = _under_published_ids(records, published)
        others = [record for record in published if record.volume_id not in own and record.volume_id not in replaced]
        if others and not append:
            warnings.append(
                f"{len(others)} volumes that another job published while this one ran were kept, the first: "
                f"{others[0].volume_id}; run it again to publish its source alone"
            )
        facts = dict(dataset)
        if others and latest is not None:
            facts = _joined(latest.dataset, dataset, warnings)
        earlier = _splits(own.values(), (*before, *published))
        volumes = _split([*own.values(), *others], policy, earlier, store.url, warnings, refused)
        return Manifest.from_records(volumes, with_class_names(facts, volumes, dataset.get("labels") or {}, warnings))

    return update(store, merged), tuple(warnings)


def check_subjects(thing: str, subjects: Sequence[str], least: int, refused: Sequence[Quarantined] = ()) -> None:
    """Refuse fewer subjects than `least`.

    Args:
        thing: What the error names.
        subjects: Of each volume that is left.
        refused: Volumes that were refused, which may be why.

    Raises:
        RefusedInput: too few subjects, with the reasons of the refusals, or the names that were taken for one person's.
    """
    count = len(set(subjects))
    if count >= least:
        return
    expected = f"at least {least} subjects, to be split into training and test"
    if refused:
        raise RefusedInput(
            thing,
            expected=f"{expected}, after the refused volumes are left out",
            found=f"{count}; refused: {'; '.join(by_reason(refused))}",
            remedy="repair the refused volumes, or see what the policy can do with them",
        )
    remedy = "add subjects, correct subject_pattern, or set min_subjects to 1 for a store that is never split"
    if len(subjects) > count:
        times = Counter(subjects).most_common(1)[0][1]
        remedy = (
            f"if the {times} volumes of one of them are different people, set subject_pattern='{EACH_FILE}' or a "
            f"subject_table; else {remedy}"
        )
    raise RefusedInput(thing, expected=expected, found=f"{count}", remedy=remedy)


def _under_published_ids(records: Iterable[VolumeRecord], published: Sequence[VolumeRecord]) -> dict[str, VolumeRecord]:
    """The run's records by id; of one that is published already, its id and its computed maps."""
    ids = {record.volume_id for record in published}
    versions = {_version(record): record for record in published}
    own: dict[str, VolumeRecord] = {}
    for record in records:
        same = versions.get(_version(record))
        if same is not None:
            record = replace(same, subject=record.subject, study=record.study, notes=record.notes)
        elif record.volume_id in ids:
            raise RefusedInput(
                f"volume {record.volume_id}",
                expected="an id that no other content has",
                found="another version of it, published meanwhile by another job",
                remedy="run it again",
            )
        own[record.volume_id] = record
    return own


def _splits(records: Iterable[VolumeRecord], published: Sequence[VolumeRecord]) -> dict[str, str]:
    """Splits by published subject, and by new names of such: a pattern or new files may rename whose volume it is."""
    earlier = {record.subject: record.split for record in published}
    versions = {_version(record): record.split for record in published}
    renamed: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        renamed[record.subject].add(versions.get(_version(record), ""))
    for subject, names in renamed.items():
        if len(published_splits := names - {""}) == 1:  # of several none can stay
            earlier.setdefault(subject, published_splits.pop())
    return earlier


def _version(record: VolumeRecord) -> tuple[str, str, str]:
    return record.source, record.source_sha256, record.policy


def _joined(stored: Mapping[str, Any], new: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    """Facts of a data set to which volumes are added: what the store says stays, what it does not say is added."""
    facts = {**new, **stored}
    if isinstance(stored.get("labels"), dict) and isinstance(new.get("labels"), dict):
        facts["labels"] = {**new["labels"], **stored["labels"]}
    for key in sorted(facts.keys() - {"name"}):
        if key in stored and key in new and facts[key] != new[key] and not _part(new[key], facts[key]):
            warnings.append(f"{key} of the store, {facts[key]!r}, differs from {new[key]!r} of the source and was kept")
    return facts


def _part(some: Any, whole: Any) -> bool:
    return isinstance(some, dict) and isinstance(whole, dict) and some.items() <= whole.items()


def _split(
    records: Sequence[VolumeRecord],
    policy: IngestPolicy,
    earlier: Mapping[str, str],
    thing: str,
    warnings: list[str],
    refused: Sequence[Quarantined],
) -> list[VolumeRecord]:
    """The records with their splits, and notes on equal content."""
    check_subjects(thing, [record.subject for record in records], policy.min_subjects, refused)
    members = [(record.subject, image_digest(record)) for record in records]
    # Other policies make other voxels of the same file: whoever has its copy under another name is the same person too.
    members += [(record.subject, f"source {record.source_sha256}") for record in records if record.source_sha256]
    split = splits.assign(members, policy.split, policy.seed, earlier)
    first: dict[str, str] = {}
    again: dict[str, list[str]] = {}
    final = []
    for record in sorted(records, key=lambda r: r.volume_id):
        notes = tuple(note for note in record.notes if not note.startswith("same content as "))
        same = first.setdefault(image_digest(record), record.volume_id)
        if same != record.volume_id:
            notes = (*notes, f"same content as {same}")
            again.setdefault(same, []).append(record.volume_id)
        final.append(replace(record, split=split[record.subject], notes=notes))
    policies: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        policies[record.source_sha256].add(record.policy)
    several = [record.volume_id for record in final if record.source_sha256 and len(policies[record.source_sha256]) > 1]
    if several:
        warnings.append(f"{len(several)} volumes are of scans that other policies were used for too: {several[0]}, ...")
    for same, ids in again.items():
        listing = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
        warnings.append(f"same content as {same}, and in one split with it: {listing}")
    if note := near_copies_note(final):
        warnings.append(note)
    for name, share in zip(splits.SPLITS, policy.split, strict=True):
        if share > 0 and name not in split.values():
            warnings.append(f"no subject in split {name}: too few subjects")
    return final
