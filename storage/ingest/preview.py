"""What an ingest of a folder would make of it, from names and headers alone.

Every check is the one that ingest itself makes before it reads voxels. What only voxels tell, such as a constant image
or a damaged end of a file, is found by the ingest.
"""

import math
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.dataset_facts import dataset_facts
from storage.ingest.deidentify import Pseudonyms
from storage.ingest.discover import discover
from storage.ingest.items import Discovery, IngestItem
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import LIBRARY_FAULTS, check_resampled, label_axes, unreadable
from storage.ingest.publishing import splits
from storage.ingest.publishing.claims import hides
from storage.ingest.publishing.publish import check_subjects
from storage.ingest.publishing.quarantine import Quarantined, reason_of
from storage.ingest.readers.read import read_item_header, read_label_header
from storage.ingest.work import size_of

THREADS = min(16, 4 * (os.cpu_count() or 1))
"""Headers are waited for more than they are worked on."""
VOXELS_PER_S = 40e6
"""Of one core, of gzipped int16 files at their own spacing.

With `S_PER_FILE`, a line by eye through processor seconds of ingests into a folder in memory, the least of several
on a busy machine: 0.022 s for a volume of 0.3 million voxels (LA), 0.029 for 0.55 million (of ACDC's size),
0.07 for 2.35 million (CHAOS, before the last speed-up). Slow disks, resampling and decoding of DICOM come on top.
"""
S_PER_FILE = 0.014
"""Of one core, whatever its size."""


@dataclass(frozen=True, slots=True)
class VolumePreview:
    """One volume that an ingest would take.

    Args:
        shape_CDHW: As it would be stored.
        spacing_mm: As it would be stored, along D, H, W.
        modality: As headers or the data set name it; an ingest also tells CT by its values.
        voxels: To be read, its channels and label counted.
        notes: What was assumed or chosen.
        label_checked: Whether it has no label map, or one that lies on its grid.
    """

    item: IngestItem
    shape_CDHW: tuple[int, ...]
    spacing_mm: tuple[float, float, float]
    modality: str
    voxels: int
    notes: tuple[str, ...]
    label_checked: bool


@dataclass(frozen=True, slots=True)
class Preview:
    """What an ingest would do, as far as headers tell.

    Args:
        volumes: Those that no header speaks against.
        refused: Those that would be refused, with the reasons.
        splits: Subjects of each split; None where pseudonyms decide that and their salt is not here.
        problem: Why nothing would be published; empty where something would.
        bytes_in: Of the files of all volumes.
        unchecked_labels: Label maps whose place is known only when they are read.
    """

    discovery: Discovery
    volumes: tuple[VolumePreview, ...]
    refused: tuple[Quarantined, ...]
    splits: dict[str, int] | None
    problem: str
    bytes_in: int
    unchecked_labels: int

    @property
    def bytes_stored(self) -> int:
        """Before compression, images as int16 and labels as uint8: the most where no value needs more."""
        labels = sum(math.prod(v.shape_CDHW[1:]) for v in self.volumes if v.item.label is not None)
        return sum(2 * math.prod(v.shape_CDHW) for v in self.volumes) + labels

    def seconds(self, cores: int) -> float:
        """About how long an ingest takes on so many cores, at `VOXELS_PER_S`."""
        files = sum(len(v.item.files) for v in self.volumes)
        return (sum(v.voxels for v in self.volumes) / VOXELS_PER_S + files * S_PER_FILE) / cores


def preview(
    src: str,
    policy: IngestPolicy | None = None,
    *,
    pseudonyms: Pseudonyms | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Preview:
    """Look at a folder as `pipeline.run` would, without reading voxels or writing anything.

    Args:
        src: Folder (or file) of volumes.
        policy: See `IngestPolicy`.
        pseudonyms: Salt of identifiers, where it is known.
        progress: Called with headers read and volumes in all.

    Raises:
        ConfigError: `src` does not exist.
        RefusedInput: it holds no volumes.
    """
    policy = policy or IngestPolicy()
    discovery = discover(src, policy.subject_pattern, policy.subject_table)
    volumes: list[VolumePreview] = []
    refused = [Quarantined(orphan.source, orphan.source, orphan.what) for orphan in discovery.refused]
    modality = dataset_facts(discovery.root, "").modality
    with ThreadPoolExecutor(THREADS) as pool:
        looks = pool.map(lambda item: _looked_at(item, policy, modality), discovery.items)
        for done, look in enumerate(looks, 1):
            if isinstance(look, VolumePreview):
                volumes.append(look)
            else:
                refused.append(look)
            if progress is not None:
                progress(done, len(discovery.items))
    refused.sort(key=lambda q: q.source)
    return Preview(
        discovery,
        tuple(volumes),
        tuple(refused),
        _splits(volumes, policy, pseudonyms),
        _problem(src, discovery, volumes, refused, policy),
        sum(size_of(item) for item in discovery.items),
        sum(not v.label_checked for v in volumes),
    )


def _looked_at(item: IngestItem, policy: IngestPolicy, modality: str) -> VolumePreview | Quarantined:
    try:
        return _volume(item, policy, modality)
    except RefusedInput as error:
        return Quarantined(item.source, item.source, reason_of(error, item, policy))
    except LIBRARY_FAULTS as error:
        return Quarantined(item.source, item.source, reason_of(unreadable(item, error), item, policy))


def _volume(item: IngestItem, policy: IngestPolicy, modality: str) -> VolumePreview:
    """What becomes of an item, with the checks of `prepare.prepare` that need no voxels.

    Raises:
        RefusedInput: it would be refused.
    """
    header = read_item_header(item, policy.read)
    shape, affine = geometry.canonical_grid(header.shape_CDHW[1:], header.affine)
    label = read_label_header(item, policy.read)
    if label is not None and geometry.shear(header.affine) <= 1e-3:
        thing = f"label of {item.source}"
        label_axes(thing, label.shape_CDHW[1:], label.affine, header.affine, (shape, affine), policy, [])
    native = geometry.spacing_dhw(affine)
    target = policy.target_spacing(native)
    channels = header.shape_CDHW[0]
    stored = check_resampled(item.source, (channels, *shape), native, target, policy)
    voxels = math.prod(header.shape_CDHW) + (0 if item.label is None else math.prod(shape))
    modality = policy.modality or header.modality or modality
    checked = item.label is None or label is not None
    return VolumePreview(item, (channels, *stored), target, modality, voxels, header.notes, checked)


def _splits(volumes: list[VolumePreview], policy: IngestPolicy, pseudonyms: Pseudonyms | None) -> dict[str, int] | None:
    subjects = set()
    for volume in volumes:
        if not hides(volume.item, policy):
            subjects.add(volume.item.subject)
        elif pseudonyms is not None:
            subjects.add(pseudonyms.of("subject", volume.item.subject))
        else:
            return None
    split = splits.assign([(subject, subject) for subject in subjects], policy.split, policy.seed)
    counts = Counter(split.values())
    return {name: counts[name] for name in splits.SPLITS}


def _problem(
    src: str,
    discovery: Discovery,
    volumes: list[VolumePreview],
    refused: list[Quarantined],
    policy: IngestPolicy,
) -> str:
    total = len(discovery.items) + len(discovery.refused)
    if len(refused) > policy.max_failed * total:
        return f"{len(refused)} of {total} would be refused: more than max_failed {policy.max_failed:g} allows"
    try:
        check_subjects(src, [v.item.subject for v in volumes], policy.min_subjects, refused)
    except RefusedInput as error:
        return f"expected {error.expected}; found {error.found.partition('; refused')[0]}; {error.remedy}"
    return ""
