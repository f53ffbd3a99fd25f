"""What tells images at one position apart, and what the slices of one volume share.

Instance numbers and file names say nothing. A *dimension* is an attribute, such as EchoTime, that has the same values
at each position. Attributes of the physics come first, then any other standard one. Where several are needed, as of
echoes in magnitude and phase, all are taken together. Images that are still alike are told apart by a clock, if all of
one time point precede all of the next. Dimensions of multi-frame objects: DICOM PS3.3 C.7.6.17.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pydicom
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.tag import Tag

from storage.errors import RefusedInput
from storage.ingest.readers.dicom.file import DAMAGED, Slice

Value = Any
"""A number, a text, a tuple of them, or None where the attribute is missing."""

_NUMBERS = (
    "EchoTime",
    "EffectiveEchoTime",
    "EchoNumbers",
    "DiffusionBValue",
    "InversionTime",
    "InversionTimes",
    "FlipAngle",
    "KVP",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "NominalPercentageOfCardiacPhase",
    "NominalPercentageOfRespiratoryPhase",
)
"""Attributes whose values are numbers that name nobody: messages quote them."""
_SAME = (
    *_NUMBERS,
    "ImageType",
    "ComplexImageComponent",
    "DiffusionGradientOrientation",
    "DiffusionDirectionality",
    "ConvolutionKernel",
    "FilterType",
    "ScanningSequence",
    "SequenceVariant",
    "SequenceName",
    "MRAcquisitionType",
    "MagneticFieldStrength",
    "ContrastBolusAgent",
    "PatientPosition",
    "Units",
    "Modality",
    "SOPClassUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "StackID",
)
"""Attributes that all slices of a volume share."""
_NOT_IN_TURN = (
    *("AcquisitionNumber", "SeriesNumber", "SliceThickness", "EchoTrainLength", "ReconstructionDiameter"),
    *("AcquisitionMatrix", "RescaleType", "ScanOptions", "CorrectedImage", "SeriesType", "SeriesDescription"),
    *("ProtocolName", "BodyPartExamined", "ReceiveCoilName", "Manufacturer", "StationName", "DeviceSerialNumber"),
)
"""Attributes that may change once along a scan, as where thick slices follow thin ones, and not to and fro."""
_CYCLES = ("TriggerTime", "NominalCardiacTriggerDelayTime", "TriggerDelayTime")
"""Times within a heart beat: they differ a little from slice to slice, and begin again."""
_CLOCKS = (
    *_CYCLES,
    "AcquisitionNumber",
    "FrameReferenceTime",
    "FrameReferenceDateTime",
    "FrameAcquisitionDateTime",
    "AcquisitionDateTime",
    "AcquisitionTime",
    "ContentTime",
)
_COMPARED = (*_SAME, *_CLOCKS, "RepetitionTime")
_NO_DIMENSION = frozenset(
    {"SOPInstanceUID", "InstanceNumber", "InstanceCreationDate", "InstanceCreationTime"}
    | {"InStackPositionNumber", "SliceLocation", "ImagePositionPatient", "ImageOrientationPatient"}
    | {"PixelSpacing", "TablePosition", "WindowCenter", "WindowWidth", "WindowCenterWidthExplanation"}
    | {"RescaleSlope", "RescaleIntercept", "SmallestImagePixelValue", "LargestImagePixelValue", "Rows"}
    | {"Columns", "DimensionIndexValues", "FrameLabel", "PixelPaddingValue", "LossyImageCompressionRatio"}
    | {"SpecificCharacterSet", "FrameAcquisitionNumber", "ImageIndex", "ConcatenationFrameOffsetNumber"}
    | {"InConcatenationNumber", "XRayTubeCurrent", "Exposure"}
)
"""Attributes of single images, or of how they are looked at."""
_IN_SPACE = frozenset(["ImagePositionPatient", "InStackPositionNumber", "ImageOrientationPatient", "SliceLocation"])
_INDEX = "dimension index of "
_CODES = frozenset(
    {"ORIGINAL", "DERIVED", "PRIMARY", "SECONDARY", "AXIAL", "LOCALIZER", "OTHER", "M", "P", "R", "I"}
    | {"MAGNITUDE", "PHASE", "REAL", "IMAGINARY", "MIXED", "ADC", "FA", "TRACEW", "DIFFUSION", "WATER", "FAT"}
    | {"IN_PHASE", "OPP_PHASE", "OUT_PHASE", "MPR", "MIP", "MOSAIC", "NORM", "ND", "ADD", "HELIX", "SUBTRACTION"}
    | {"PERFUSION", "VELOCITY"}
)
"""Values of ImageType that messages quote; others may be free text."""
_SUMMED = "ADD"  # GE marks thick slices so that are sums of thin ones, beside others of one scan
_ALIKE = 0.01  # numbers within this share of each other are one: scanners round and adjust them
_GATED = 0.1


@dataclass(frozen=True, slots=True)
class Channels:
    """Images at each position in one order.

    Args:
        places: Of each position its images, in the order of `label`'s values.
        label: The attributes that tell them apart and their values, as messages may quote them.
    """

    places: list[list[Slice]]
    label: str


def attributes(slices: Sequence[Slice]) -> dict[int, dict[str, Value]]:
    """Of each image, by its `id`, what may tell it from others or bind it to slices beside it; see `_COMPARED`."""
    whole: dict[int, dict[str, Value]] = {}  # of headers and of groups that all frames of a file share, worked out once
    facts = {}
    for s in slices:
        if id(s.header) not in whole:
            whole[id(s.header)] = {name: value_of(s.header, name) for name in _COMPARED}
        values = dict(whole[id(s.header)])
        if len(s.groups) > 1:
            frame, shared, _ = s.groups
            if id(shared) not in whole:
                whole[id(shared)] = _flat(shared)
            inner = whole[id(shared)] | _flat(frame)
            values |= {name: inner[name] for name in _COMPARED if inner.get(name) is not None}
            values["ImageType"] = inner.get("FrameType") or values["ImageType"]
            values |= _indices(s.header, inner)
        if isinstance(values["ImageType"], tuple):
            values["ImageType"] = tuple(part for part in values["ImageType"] if part != _SUMMED)
        for clock, day in (("AcquisitionTime", "AcquisitionDate"), ("ContentTime", "ContentDate")):
            if values[clock] is not None:  # or midnight would turn the order round
                values[clock] = f"{value_of(s.header, day) or ''} {values[clock]}".replace(":", "")
        facts[id(s)] = values
    return facts


def told_apart(places: Sequence[Sequence[Slice]], facts: dict[int, dict[str, Value]]) -> Channels | None:
    """Put the images at each position into one order by what distinguishes them; None where nothing does.

    Args:
        places: Of each position its images, equally many.
        facts: What `attributes` returned.
    """
    listed = list(facts[id(places[0][0])])
    physics = [name for name in listed if name not in _CLOCKS and not name.endswith("UID")]
    channels = _ordered(places, facts, [*physics, *_CLOCKS])
    if channels is None:
        more = {id(s): _others(s) | facts[id(s)] for place in places for s in place}
        # UIDs have no order, and places in two frames of reference are not one place
        others = sorted({n for values in more.values() for n in values if not n.endswith("UID")} - set(listed))
        channels = _ordered(places, more, [*physics, *others, *_CLOCKS])
    return channels


def _ordered(
    places: Sequence[Sequence[Slice]], facts: dict[int, dict[str, Value]], names: Sequence[str]
) -> Channels | None:
    """By the fewest attributes that are complete, the first of `names` preferred; by a clock where they leave ties."""

    def key(s: Slice, attribute_names: Sequence[str]) -> tuple[tuple[int, Value], ...]:
        return tuple(_sortable(facts[id(s)].get(name)) for name in attribute_names)

    def kinds(attribute_names: Sequence[str]) -> int:
        """How many kinds of images they tell apart; 0 where positions have not the same ones."""
        first, *others = (Counter(key(s, attribute_names) for s in place) for place in places)
        return len(first) if all(other == first for other in others) else 0

    needed: list[str] = []
    apart = 1
    for name in names:
        if (more := kinds([*needed, name])) > apart:
            needed, apart = [*needed, name], more
    for name in needed[::-1]:
        fewer = [n for n in needed if n != name]
        if fewer and kinds(fewer) == apart:
            needed = fewer
    clock = ""
    if apart < len(places[0]):
        clock = next((n for n in names if n in _CLOCKS and _tells_time(places, facts, n, lambda s: key(s, needed))), "")
        if not clock:
            return None
    by = [*needed, clock] if clock else needed
    ordered = [sorted(place, key=lambda s: key(s, by)) for place in places]
    label = "; ".join(_label(name, [facts[id(s)].get(name) for s in ordered[0]]) for name in by)
    return Channels(ordered, label)


def _tells_time(
    places: Sequence[Sequence[Slice]],
    facts: dict[int, dict[str, Value]],
    clock: str,
    key: Callable[[Slice], Value],
) -> bool:
    """Whether images of equal `key` have times of their own at each position, and time points do not overlap."""
    spans: dict[tuple[Value, int], list[Value]] = {}
    for place in places:
        times: dict[Value, list[Value]] = {}
        for s in place:
            times.setdefault(key(s), []).append(_sortable(facts[id(s)].get(clock)))
        for kind, own in times.items():
            if (0, 0) in own or len(set(own)) < len(own):
                return False
            for rank, time in enumerate(sorted(own)):
                spans.setdefault((kind, rank), []).append(time)
    if clock in _CYCLES:
        return True
    return all(
        max(own) < min(spans[kind, rank + 1]) for (kind, rank), own in spans.items() if (kind, rank + 1) in spans
    )


def check_same(thing: str, planes: Sequence[Slice], facts: dict[int, dict[str, Value]]) -> None:
    """Refuse a stack of one image a position whose slices are of several acquisitions.

    Raises:
        RefusedInput: names the attribute that differs.
    """
    for name in _SAME:
        values = [facts[id(s)].get(name) for s in planes]
        counts = Counter(values)
        # Some anonymisers give each file UIDs of its own, which say nothing then.
        own = len(counts) == len(values) and name in ("StudyInstanceUID", "FrameOfReferenceUID")
        if len(counts) > 1 and not own and not _alike(values):
            raise _several(thing, name, counts)
    for name in sorted({name for s in planes for name in facts[id(s)] if name.startswith(_INDEX)}):
        counts = Counter(facts[id(s)].get(name) for s in planes)
        # An index of its own in each frame is another word for its position.
        if 1 < len(counts) < len(planes) and name.removeprefix(_INDEX) not in {*_CLOCKS, *_NO_DIMENSION}:
            raise _several(thing, name, counts)
    counts = Counter(facts[id(s)].get("RepetitionTime") for s in planes)
    if len(counts) > 1 and min(counts.values()) > 1 and not _alike(list(counts), _GATED):  # gated slices have each own
        raise _several(thing, "RepetitionTime", counts)


def check_in_turn(thing: str, planes: Sequence[Slice]) -> None:
    """Refuse slices of two scans that take turns along the normal, each of them of several slices.

    Args:
        planes: One image a position. Frames of one object are not looked at: they share such attributes.

    Raises:
        RefusedInput: names the attribute that differs.
    """
    for name in _NOT_IN_TURN:
        values = [value_of(s.header, name) for s in planes if len(s.groups) == 1]
        counts = Counter(values)
        changes = sum(a != b for a, b in itertools.pairwise(values))
        if changes >= len(counts) > 1 and min(counts.values()) > 1 and not _alike(values):
            raise _several(thing, name, counts)


def differing(images: Sequence[Slice], facts: dict[int, dict[str, Value]]) -> str:
    """Names of up to three attributes in which images differ, for messages."""
    names = [name for name in (*_SAME, *_CLOCKS) if len({facts[id(s)].get(name) for s in images}) > 1]
    return ", ".join(names[:3])


def _several(thing: str, name: str, counts: Counter[Value]) -> RefusedInput:
    if name in (*_NUMBERS, "ImageType", "RepetitionTime", "SliceThickness") and len(counts) <= 4:
        ordered = sorted(counts.items(), key=lambda item: _sortable(item[0]))
        what = " and ".join(f"{_quoted(value)} in {count}" for value, count in ordered)
    else:
        most = counts.most_common(1)[0][1]
        what = f"of {len(counts)} values, {counts.total() - most} of {counts.total()} slices unlike most"
    return RefusedInput(
        thing,
        expected="slices of one acquisition",
        found=f"several that interleave or adjoin: {name} {what}",
        remedy="they share a series id: separate them by that attribute",
    )


def _label(name: str, values: Sequence[Value]) -> str:
    """An attribute and its distinct values in order, as far as they cannot name anybody."""
    distinct = list(dict.fromkeys(values))
    if (name in _NUMBERS or name.startswith(_INDEX) or name == "RepetitionTime") and all(
        isinstance(value, float) for value in distinct if value is not None
    ):
        if len(distinct) > 6:
            return f"{name} ({len(distinct)} values from {_quoted(distinct[0])} to {_quoted(distinct[-1])})"
        return f"{name} ({', '.join(map(_quoted, distinct))})"
    if name in ("ImageType", "ComplexImageComponent") and len(distinct) <= 6:
        return f"{name} ({', '.join(map(_quoted, distinct))})"
    return f"{name} ({len(distinct)} values)"


def _quoted(value: Value) -> str:
    if value is None:
        return "missing"
    if isinstance(value, float):
        return f"{value:g}"
    parts = value if isinstance(value, tuple) else (value,)
    return "/".join(f"{p:g}" if isinstance(p, float) else p if p in _CODES else "(other)" for p in parts)


def _alike(values: Sequence[Value], share: float = _ALIKE) -> bool:
    """Whether all are numbers that differ by rounding only."""
    if not all(isinstance(value, float) for value in values):
        return False
    return bool(max(values) - min(values) <= share * max(abs(value) for value in values))


def _sortable(value: Value) -> tuple[int, Value]:
    """Missing values first, then numbers, then texts, then several of them."""
    if value is None:
        return 0, 0
    if isinstance(value, tuple):
        return 3, tuple(_sortable(part) for part in value)
    return (1, value) if isinstance(value, float) else (2, value)


def _value(raw: Any) -> Value:
    """A comparable value; None for what is missing, empty, nested or bytes."""
    if raw is None or isinstance(raw, (bytes, pydicom.Sequence)):
        return None
    if isinstance(raw, (int, float)):
        return float(f"{float(raw):.6g}") if math.isfinite(raw) else None
    if isinstance(raw, (list, tuple, pydicom.multival.MultiValue)):
        values = tuple(_value(part) for part in raw)
        return values[0] if len(values) == 1 else values or None
    text = str(raw).strip().upper()
    try:
        return float(f"{float(text):.6g}") if isinstance(raw, pydicom.valuerep.DSdecimal) else text or None
    except ValueError:
        return text


def value_of(group: Any, keyword: str) -> Value:
    """The value of an attribute, None where it is malformed: what does not bind slices says nothing of their place."""
    try:
        return _value(group.get(keyword))
    except DAMAGED:
        return None


def _flat(group: Any, depth: int = 3) -> dict[str, Value]:
    """Values of a functional group and of the single items in it, by keyword."""
    values: dict[str, Value] = {}
    for tag in tuple(group.keys()):
        keyword = keyword_for_tag(tag)
        value = group.get(keyword) if dictionary_has_tag(tag) and dictionary_VR(tag) == "SQ" else None
        if value is not None:
            if depth and len(value) == 1:
                values = _flat(value[0], depth - 1) | values
        elif keyword:
            values[keyword] = value_of(group, keyword)
    return values


def _indices(header: Any, frame: dict[str, Value]) -> dict[str, Value]:
    """The indices of a frame in dimensions other than space, named by what they point to."""
    own = frame.get("DimensionIndexValues")
    values = own if isinstance(own, tuple) else () if own is None else (own,)
    indices: dict[str, Value] = {}
    for number, (item, value) in enumerate(zip(header.get("DimensionIndexSequence") or [], values, strict=False)):
        pointer = item.get("DimensionIndexPointer")
        name = keyword_for_tag(Tag(pointer)) if pointer is not None else ""
        if name not in _IN_SPACE:
            indices[f"{_INDEX}{name or f'a private attribute ({number + 1})'}"] = value
    return indices


def _others(s: Slice) -> dict[str, Value]:
    """Every standard attribute that could be a dimension."""
    values = _flat(s.groups[0]) if len(s.groups) > 1 else _flat(s.header, depth=0)
    return {name: value for name, value in values.items() if name not in _NO_DIMENSION and value is not None}
