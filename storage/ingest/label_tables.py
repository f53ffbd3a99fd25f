"""Names of label values that come with a label map: in its file, or in a table beside or above it.

- NIfTI: a label table as XML in a header extension (Connectome Workbench, Caret), AFNI's `VALUE_LABEL_DTABLE`, and with
  the intent "label" the file beside it that `aux_file` names;
- NRRD: `Segment0_Name` and `Segment0_LabelValue`, as 3D Slicer writes them;
- DICOM: `SegmentLabel` of each segment, unless it may identify a person;
- beside the map and of its name: label descriptions of ITK-SNAP (`.txt`, `.label`), colour tables of 3D Slicer
  (`.ctbl`) and `.tsv` with the columns index and name;
- BIDS: `*_dseg.tsv` of which every entity is the map's too, in its folder or one above it: the nearest folder counts,
  and there the file with most entities.

A table that cannot be read names nothing. Whether names agree, `storage.ingest.publishing.class_names` looks at.
"""

import csv
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from isal import igzip, isal_zlib

from storage.errors import RefusedInput
from storage.ingest.discover import legible
from storage.ingest.items import IngestItem
from storage.ingest.readers.registry import format_of, split_name
from storage.nifti_header import MOST_BYTES, parse_header

NAMES_NOTE = "label_names="
NO_NAMES = "label values without their names: "
_gzip_open: Any = igzip.open  # untyped
_gzip_error: Any = isal_zlib.error
_MOST = 1 << 20
"""Bytes of a table or a header's extensions that are looked at."""
_LONGEST = 100
_LABEL_INTENT = 1002
"""NIFTI_INTENT_LABEL of nifti1.h."""
_SEGMENT = re.compile(r"^Segment(\d+)_(Name|LabelValue|Layer):=(.*)$", re.MULTILINE)
_SNAP = re.compile(r'^\s*(\d+)(?:\s+\d+){3}\s+[\d.]+\s+[01]\s+[01]\s+"(.*)"\s*$')
_COLOURS = re.compile(r"^\s*(\d+)\s+(\S+)(?:\s+\d+){4}\s*$")
_AFNI = re.compile(r'"(\d+)"\s+"([^"]*)"')
_TURNED = "turned into classes"
Names = dict[int, str]
State = tuple[str, int, int]


def label_names(item: IngestItem, values: Iterable[int], notes: Sequence[str]) -> tuple[str, ...]:
    """Notes for the record of a volume: the names of its label values, and which of them its tables dispute.

    Args:
        values: Label values that the volume has.
        notes: What was noted of it: where channels were turned into classes, no table is of these.
    """
    if item.label is None or any(_TURNED in note for note in notes):
        return ()
    present = set(values) - {0}
    if format_of(item.kind).hides_identity:
        # no table beside it: it may name a person
        return () if split_name(Path(item.label).name)[1] else _segments(item.label, item.images[0], present)
    names: dict[int, tuple[str, str]] = {}
    disputed: dict[int, str] = {}
    for where, table in _tables(Path(item.label), _root(item)):
        for value in sorted(present & table.keys()):
            name, before = table[value], names.setdefault(value, (table[value], where))
            if not same_name(name, before[0]):
                disputed[value] = f"{value} is {before[0]!r} in {before[1]} and {name!r} in {where}"
    out = []
    if agreed := {str(value): name for value, (name, _) in sorted(names.items()) if value not in disputed}:
        out.append(f"{NAMES_NOTE}{json.dumps(agreed, ensure_ascii=False)}")
    if disputed:
        out.append(f"{NO_NAMES}{'; '.join(disputed[value] for value in sorted(disputed))}"[:1000])
    return tuple(out)


def _segments(label: str, image: str, present: set[int]) -> tuple[str, ...]:
    """Notes on the segments of a DICOM segmentation that the volume has."""
    from storage.ingest.readers.dicom.seg import segment_labels  # pydicom is imported where there is DICOM

    labels, hidden = segment_labels(label, image)
    names = _cleaned((str(number), name) for number, name in labels.items() if number in present)
    out = []
    if names:
        by_value = {str(value): name for value, name in sorted(names.items())}
        out.append(f"{NAMES_NOTE}{json.dumps(by_value, ensure_ascii=False)}")
    if left := sorted(present.intersection(hidden)):
        out.append(f"{NO_NAMES}{', '.join(map(str, left))}, whose segment's label may identify a person")
    return tuple(out)


def with_label_names(record_notes: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The notes of a volume with the names that this run read, and those of no earlier one."""
    return (*(note for note in record_notes if not note.startswith((NAMES_NOTE, NO_NAMES))), *names)


def noted_names(notes: Iterable[str]) -> Mapping[str, str]:
    """Names by value among the notes of a record."""
    for note in notes:
        if note.startswith(NAMES_NOTE):
            names: dict[str, str] = json.loads(note.removeprefix(NAMES_NOTE))
            return names
    return {}


def same_name(a: str, b: str) -> bool:
    """Whether two names differ at most in case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]+", " ", a).casefold() == re.sub(r"[\s_-]+", " ", b).casefold()


def _root(item: IngestItem) -> Path:
    """The ingested folder, as far as the path of the image tells."""
    image = item.images[0]
    return Path(image.removesuffix(item.source)) if image.endswith(item.source) else Path(image).parent


def _tables(label: Path, root: Path) -> Iterator[tuple[str, Names]]:
    """Tables of a map with the names of their files."""
    stem, suffix = split_name(label.name)
    intent_file = ""
    if suffix in (".nii", ".nii.gz", ".hdr"):
        names, intent_file = _nifti(label)
        yield label.name, names
    elif suffix in (".nrrd", ".nhdr"):
        yield label.name, _nrrd(label)
    folder = _listing(label.parent)
    beside = [f"{stem}{end}" for end in (".tsv", ".txt", ".label", ".ctbl")]
    for name in dict.fromkeys([*beside, Path(intent_file).name]):
        if name and name in folder:
            yield name, _table(label.parent / name)
    if stem.startswith("sub-") and f"{stem}.tsv" not in folder:
        inherited = _inherited(stem, label.parent, root)
        if inherited is not None:
            yield inherited.name, _table(inherited)


def _inherited(stem: str, folder: Path, root: Path) -> Path | None:
    """The table of BIDS that is the map's by its entities."""
    own = set(stem.split("_"))
    while folder.is_relative_to(root):
        fits = [
            name
            for name in _listing(folder)
            if name == "dseg.tsv" or (name.endswith("_dseg.tsv") and set(name.removesuffix(".tsv").split("_")) <= own)
        ]
        if fits:
            return folder / max(fits, key=lambda name: (name.count("_"), name))
        if folder == root:
            break
        folder = folder.parent
    return None


def _nifti(path: Path) -> tuple[Names, str]:
    """Names in the extensions of a header, and the file that its label intent names."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with _gzip_open(path) if packed else path.open("rb") as file:
            head = file.read(MOST_BYTES)
            header = parse_header(path.name, head, pair=path.name.lower().endswith(".hdr"))
            end = header.offset if header.offset else _MOST
            data = head + file.read(max(0, min(end, _MOST) - len(head)))
    except (RefusedInput, OSError, EOFError, ValueError, zlib.error, _gzip_error):
        return {}, ""
    little = int.from_bytes(data[:4], "little") in (348, 540)
    at = int.from_bytes(data[:4], "little" if little else "big") + 4
    names: Names = {}
    while data[at - 4 : at - 3] != b"\0" and at + 16 <= min(len(data), end):
        size = int.from_bytes(data[at : at + 4], "little" if little else "big")
        if size < 16 or at + size > len(data):
            break
        names |= _from_xml(data[at + 8 : at + size])
        at += size
    intent = int(header.record["intent_code"]) == _LABEL_INTENT
    return names, bytes(header.record["aux_file"]).decode("ascii", "replace").strip("\0 ") if intent else ""


def _from_xml(data: bytes) -> Names:
    """Label tables of an XML document: `<Label Key="1">name</Label>`, or AFNI's table of quoted pairs."""
    start, end = data.find(b"<"), data.rfind(b">")
    if start < 0 or b"<!ENTITY" in data:
        return {}
    try:
        tree = ElementTree.fromstring(data[start : end + 1])
    except (ElementTree.ParseError, ValueError, LookupError):
        return {}
    pairs: list[tuple[str | None, str | None]] = [
        (element.get("Key") or element.get("Index") or element.get("key"), element.text or element.get("Name"))
        for element in tree.iter("Label")
    ]
    for element in tree.iter("AFNI_atr"):
        if element.get("atr_name") == "VALUE_LABEL_DTABLE":
            pairs += _AFNI.findall((element.text or "").replace('\\"', '"'))
    return _cleaned(pairs)


def _nrrd(path: Path) -> Names:
    """Segments of 3D Slicer; none where several lie in layers of their own, whose values may be equal."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST).partition(b"\n\n")[0].replace(b"\r\n", b"\n").decode("utf-8", "replace")
    except OSError:
        return {}
    segments: dict[str, dict[str, str]] = {}
    for number, field, text_of in _SEGMENT.findall(text.partition("\n\n")[0]):
        segments.setdefault(number, {})[field] = text_of.strip()
    if len({segment.get("Layer", "0") for segment in segments.values()}) > 1:
        return {}
    return _cleaned((segment.get("LabelValue"), segment.get("Name")) for segment in segments.values())


def _table(path: Path) -> Names:
    try:
        stat = path.stat()
    except OSError:
        return {}
    return _read_table((str(path), stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=64)
def _read_table(state: State) -> Names:
    """Names of a text file; many maps may share one. Not to be changed."""
    if state[2] > _MOST:
        return {}
    try:
        lines = Path(state[0]).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError:
        return {}
    if state[0].endswith(".tsv"):
        try:
            rows = list(csv.DictReader((line for line in lines if line.strip()), delimiter="\t"))
        except csv.Error:
            return {}
        return _cleaned((row.get("index"), row.get("name")) for row in rows)
    matches = [match for line in lines if (match := _SNAP.match(line) or _COLOURS.match(line))]
    return _cleaned((match[1], match[2]) for match in matches)


def _listing(folder: Path) -> frozenset[str]:
    try:
        return _names_in(str(folder), folder.stat().st_mtime_ns)
    except OSError:
        return frozenset()


@lru_cache(maxsize=64)
def _names_in(folder: str, _changed: int) -> frozenset[str]:
    return frozenset(os.listdir(folder))


def _cleaned(pairs: Iterable[tuple[str | None, str | None]]) -> Names:
    """Pairs that name a value other than background; a value with two names has none."""
    names: Names = {}
    twice = set()
    for value, name in pairs:
        text = legible(" ".join((name or "").split()))[:_LONGEST]
        if value is None or not value.strip().isdecimal() or int(value) == 0 or not text.isprintable() or not text:
            continue
        if not same_name(names.setdefault(int(value), text), text):
            twice.add(int(value))
    return {value: name for value, name in names.items() if value not in twice}
