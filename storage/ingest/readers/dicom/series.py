"""Finding DICOM series in a tree of files, by content and not by name.

Files belong together by SeriesInstanceUID, wherever they lie; those without one by folder, study, series number and
modality. A DICOMDIR is not needed: it lists files that are found anyway, and goes stale when they are copied.
"""

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
from pydicom.uid import UID

from storage.ingest.items import IngestItem, Orphan
from storage.ingest.readers.dicom.file import DAMAGED, be_quiet, opened
from storage.ingest.readers.reader import Grouping

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""Storage of segmentations, and of those as label maps, which are no images either."""
DICOMDIR = "1.2.840.10008.1.3.10"
_DAMAGED_FILE = "a DICOM file whose header is damaged: the series that it belongs to is read without it"
_HOLDS_NOTHING = "an empty or unreadable file beside a series: if it is a slice, the series is read without it"
_NOT_BINARY = "a fractional or label map segmentation, which cannot be read: its image is taken without it"
_NAMED = (".dcm", ".ima", ".dcm.gz")
_TAGS = [
    "SOPClassUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "PatientID",
    "SeriesNumber",
    "Modality",
    "Rows",
    "Columns",
    "ReferencedSeriesSequence",
    "SegmentationType",
]


@dataclass(slots=True)
class _Series:
    files: list[Path] = field(default_factory=list)
    study: str = ""
    patient: str = ""
    kinds: set[str] = field(default_factory=set)


def discover_dicom(files: list[Path], top: Path) -> Grouping:
    """Group files into series, and segmentations with the series they refer to.

    Returns:
        Items, segmentations without their series and damaged files, and the files that are no DICOM images.
    """
    series: defaultdict[str, _Series] = defaultdict(_Series)
    segmentations: list[tuple[Path, str]] = []
    left: list[Path] = []
    orphans: list[Orphan] = []
    no_image: list[tuple[Path, str, str]] = []
    for path in files:
        dataset = header(path)
        if dataset is None:
            if _says_dicom(path) or _is_named(path):
                orphans.append(Orphan(path.relative_to(top).as_posix(), _DAMAGED_FILE))
            left.append(path)
            continue
        meta = getattr(dataset, "file_meta", None)
        kind = str(dataset.get("SOPClassUID") or (meta.get("MediaStorageSOPClassUID") if meta else "") or "")
        if kind == DICOMDIR:
            continue
        uid = str(dataset.get("SeriesInstanceUID") or "")
        if kind in SEGMENTATIONS and dataset.get("SegmentationType") in ("FRACTIONAL", "LABELMAP"):
            orphans.append(Orphan(path.relative_to(top).as_posix(), _NOT_BINARY))
        elif kind in SEGMENTATIONS:
            segmentations.append((path, _referenced(dataset)))
        elif "Rows" in dataset:
            entry = series[uid or _stand_in(path.relative_to(top), dataset)]
            entry.files.append(path)
            entry.kinds.add(kind)
            entry.study = str(dataset.get("StudyInstanceUID") or "") or entry.study
            entry.patient = str(dataset.get("PatientID") or "").strip() or entry.patient
        else:
            no_image.append((path, uid, kind))
    for path, uid, kind in no_image:  # reports and plans have no pixels, but say what they are, in series of their own
        if kind and uid in series and kind in series[uid].kinds:
            series[uid].files.append(path)  # a slice cut short, for which reading will refuse the series
            continue
        left.append(path)
        if (what := _object_of(kind)) and uid:
            orphans += [Orphan(path.relative_to(top).as_posix(), f"{what}: no image, and left out")] * (uid in series)
        elif uid in series or (not (uid and kind) and (_says_dicom(path) or _is_named(path))):
            orphans.append(Orphan(path.relative_to(top).as_posix(), _DAMAGED_FILE))
    beside = {file.parent for entry in series.values() for file in entry.files}
    for path in left:
        if path.parent in beside and not _is_named(path) and _holds_nothing(path):
            orphans.append(Orphan(path.relative_to(top).as_posix(), _HOLDS_NOTHING))
    labels: dict[str, Path] = {}
    for path, referenced in segmentations:
        source = path.relative_to(top).as_posix()
        if referenced not in series:
            orphans.append(Orphan(source, "segmentation of a series that is not here"))
        elif referenced in labels:
            orphans.append(Orphan(source, "a second segmentation of one series; the first by name is used"))
        else:
            labels[referenced] = path
    items = [_item(uid, entry, labels.get(uid), top) for uid, entry in sorted(series.items())]
    return Grouping(items, orphans, left)


def header(path: Path) -> Any | None:
    """The identifying tags of a DICOM file; None where it is something else.

    A file without the 128-byte preamble is taken only when it is named .dcm, .ima or .dcm.gz, for otherwise any file
    would do.
    """
    force = _is_named(path)
    if not force and not _says_dicom(path):
        return None
    be_quiet()
    try:
        with opened(path) as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS, force=force)
        for tag in _TAGS:
            dataset.get(tag)
        dataset.file_meta.get("MediaStorageSOPClassUID")
    except DAMAGED:
        return None
    return dataset


def _is_named(path: Path) -> bool:
    return path.name.lower().endswith(_NAMED)


def _stand_in(path: Path, dataset: Any) -> str:
    """What stands for the series id of a file that has none; the same wherever the ingested folder lies."""
    parts = (str(dataset.get(tag) or "") for tag in ("StudyInstanceUID", "SeriesNumber", "Modality", "PatientID"))
    key = "\0".join([path.parent.as_posix(), *parts])
    return f"none-{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def _object_of(kind: str) -> str:
    """What a standard object without pixels is called, such as Raw Data Storage; empty where that is not known."""
    uid = UID(kind)
    if not kind or uid.is_private or not uid.name.endswith("Storage") or "Image" in uid.name:
        return ""
    return uid.name.removesuffix(" Storage")


def _says_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(128)
            return file.read(4) == b"DICM"
    except OSError:
        return False


def _holds_nothing(path: Path) -> bool:
    try:
        return path.stat().st_size == 0 or not os.access(path, os.R_OK)
    except OSError:
        return True


def _referenced(dataset: Any) -> str:
    sequence = dataset.get("ReferencedSeriesSequence") or []
    return str(sequence[0].get("SeriesInstanceUID") or "") if len(sequence) else ""


def _item(uid: str, entry: _Series, label: Path | None, top: Path) -> IngestItem:
    files = sorted(entry.files)
    folder = files[0].parent.relative_to(top).as_posix()
    name = folder if folder != "." else files[0].stem
    return IngestItem(
        name=name,
        kind="dicom",
        images=tuple(str(path) for path in files),
        label=None if label is None else str(label),
        # anonymised exports often blank the id: then those of one study are at least of one person
        subject=entry.patient or entry.study or uid,
        source=folder if folder != "." else files[0].name,
        study=entry.study,
        series=uid,
    )
