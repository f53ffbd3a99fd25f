"""From slices to a volume on an even, straight grid: what lies at which position, and how far apart positions are.

Positions are often written with few decimals: 0.625 mm apart, they are .62 and .63 mm apart in the file. An even grid
fits such positions if none lies further from it than rounding explains. Its gap is then the number of fewest decimals
that fits, with more of them than the positions have.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import numpy.typing as npt

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.readers.dicom.dimensions import Value, check_in_turn, check_same, differing, told_apart
from storage.ingest.readers.dicom.file import Slice, read_values, values_of
from storage.ingest.readers.dicom.turns import check_order
from storage.ingest.readers.raw import Affine, Array, ReadPolicy

POSITION_TOLERANCE = 0.01
"""Distances below this share of the slice gap (or of a pixel, sideways) count as none."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MOST_ROUNDED = 0.2
"""Rounding of more than this share of the gap could hide a missing slice, and excuses nothing."""
_EXACT_MM = 1e-6
_OF_AN_EXPORT = ("ContentTime", "StudyInstanceUID", "FrameOfReferenceUID")
"""Attributes in which copies of one image may differ."""


@dataclass(frozen=True, slots=True)
class _Lattice:
    """An even grid that the slices lie on.

    Args:
        gap: In mm.
        numbers: Of each slice its place on the grid, from 0.
        start: Where the grid begins, in mm along the normal.
        rounded: Whether the written positions are off it by what rounding explains.
    """

    gap: float
    numbers: npt.NDArray[np.intp]
    start: float
    rounded: bool = False


def decimals(text: Any) -> int:
    """Decimals that a number is written with; none in 2.0, which is how a whole number is often printed."""
    try:
        exponent = Decimal(str(text).strip().removesuffix(".0")).as_tuple().exponent
    except InvalidOperation:
        return 0
    return max(0, -exponent) if isinstance(exponent, int) else 0


def at_positions(
    thing: str, slices: list[Slice], facts: dict[int, dict[str, Value]], policy: ReadPolicy, notes: list[str]
) -> list[list[Slice]]:
    """Slices grouped by position along the normal, after the policy for several images at one place."""
    gaps = np.diff([s.along for s in slices])
    apart = gaps[gaps > max(1e-3, POSITION_TOLERANCE * min(slices[0].spacing))]
    typical = float(np.median(apart)) if len(apart) else 1.0
    places: list[list[Slice]] = [[slices[0]]]
    for s in slices[1:]:
        if s.along - places[-1][0].along < POSITION_TOLERANCE * typical:
            places[-1].append(s)
        else:
            places.append([s])
    counts = Counter(len(place) for place in places)
    beside = max(sideways_mm(s.origin - place[0].origin, s) for place in places for s in place)
    if beside > 0.1 * min(slices[0].spacing):
        raise RefusedInput(
            thing,
            expected="images at one position that cover each other",
            found=f"some that lie {beside:.2f} mm beside the others",
            remedy="they are stacks of their own: separate the series",
        )
    channels = told_apart(places, facts) if len(counts) == 1 and max(counts) > 1 else None
    if channels is None and max(counts) > 1:
        places, dropped = _without_copies(thing, places, facts)
        if dropped:
            notes.append(f"{dropped} slices were there twice; one of each kept")
            counts = Counter(len(place) for place in places)
            channels = told_apart(places, facts) if len(counts) == 1 and max(counts) > 1 else None
    if set(counts) == {1}:
        check_same(thing, [place[0] for place in places], facts)
        check_in_turn(thing, [place[0] for place in places])
        notes += check_order(thing, [place[0] for place in places], facts)
        return places
    most = max(counts)
    if channels is None:
        differ = differing(max(places, key=len), facts)
        if len(counts) > 1:
            raise RefusedInput(
                thing,
                expected="as many images at each position",
                found=f"{min(counts)} to {most} different images at a position"
                + (f", which differ in {differ}" if differ else ""),
                remedy="images are missing, or several scans are mixed: separate them",
            )
        raise RefusedInput(
            thing,
            expected="one image at each position, or several that their headers tell apart",
            found=f"{most} different images at each position"
            + (f", and what differs ({differ}) does not pair them" if differ else " that nothing tells apart"),
            remedy="separate them: which belong together cannot be known",
        )
    if policy.four_d == "refuse":
        raise RefusedInput(
            thing,
            expected="one image at each position",
            found=f"{most} different images at each position: several acquisitions, echoes or times, told apart by "
            f"{channels.label}",
            remedy="separate them, or set read.four_d to first or channels",
        )
    for c in range(most):
        check_same(thing, [place[c] for place in channels.places], facts)
    if policy.four_d == "first":
        notes.append(f"first of {most} images at each position: {channels.label}")
        return [place[:1] for place in channels.places]
    notes.append(f"{most} images at each position taken as channels: {channels.label}")
    return channels.places


def _without_copies(
    thing: str, places: list[list[Slice]], facts: dict[int, dict[str, Value]]
) -> tuple[list[list[Slice]], int]:
    """Positions without images that another one there equals, in pixels and in what is compared; how many were left."""
    alike: list[list[list[Slice]]] = []
    for place in places:
        kinds: dict[tuple[Value, ...], list[Slice]] = {}
        for s in sorted(place, key=lambda s: (s.number, s.frame)):
            kinds.setdefault(tuple(v for n, v in facts[id(s)].items() if n not in _OF_AN_EXPORT), []).append(s)
        alike.append(list(kinds.values()))
    read_values(thing, [s for kinds_ in alike for kind in kinds_ if len(kind) > 1 for s in kind])
    out, dropped = [], 0
    for kinds_ in alike:
        unique: list[Slice] = []
        for kind in kinds_:
            digests: set[bytes] = set()
            for s in kind:
                digest = hashlib.sha256(values_of(s).tobytes()).digest() if len(kind) > 1 else b""
                unique += [] if digest in digests else [s]
                digests.add(digest)
        dropped += sum(map(len, kinds_)) - len(unique)
        out.append(unique)
    return out, dropped


def sideways_mm(way: Affine, s: Slice) -> float:
    """How far a way leads within the plane of a slice, in mm."""
    return float(np.hypot(way @ s.row, way @ s.column))


def on_grid(
    thing: str, volume_CDHW: Array, planes: Sequence[Slice], normal: Affine, policy: ReadPolicy, notes: list[str]
) -> tuple[Array, Affine]:
    """The volume and its affine, on even gaps and, where the policy says so, without tilt.

    Args:
        planes: One for each plane of the volume, in order along `normal`.

    Raises:
        RefusedInput: gaps are uneven or slices missing, they lie beside one line or are tilted, and the policy does not
            take that.
    """
    first = planes[0]
    along = np.array([s.along for s in planes])
    origins = np.array([s.origin for s in planes])
    axes = [max(s.decimals[axis] for s in planes) for axis in range(3)]
    units = 0.5 * 10.0 ** -np.array(axes, np.float64)
    written = max((places for places, share in zip(axes, np.abs(normal), strict=True) if share > 0.1), default=0)
    rounding = float(np.abs(normal) @ units)
    gaps = np.diff(along)
    typical = float(np.median(gaps))
    lattice = _lattice(along, rounding, written)
    beside = 0.1 * min(first.spacing)
    if lattice is not None and lattice.rounded:
        notes.append(f"slice positions are written with {written} decimals: taken as even gaps of {lattice.gap:g} mm")
        origins = origins + np.outer(lattice.start + lattice.gap * lattice.numbers - along, normal)
        in_plane = float(np.linalg.norm(units * (1 - np.abs(normal))))
        beside = max(beside, min(2 * in_plane, 0.5 * min(first.spacing)))
    if lattice is None or len(lattice.numbers) <= lattice.numbers[-1]:
        volume_CDHW, origins = _even_gaps(thing, volume_CDHW, origins, along, typical, lattice, policy, notes)
        gap = float((origins[-1] - origins[0]) @ normal) / (len(origins) - 1)
    else:
        gap = lattice.gap
    step = (origins[-1] - origins[0]) / (len(origins) - 1)
    drift = np.abs(origins - origins[0] - np.arange(len(origins))[:, None] * step).max()
    if drift > max(beside, POSITION_TOLERANCE * typical):
        raise RefusedInput(
            thing,
            expected="slice positions along one line",
            found=f"positions up to {drift:.2f} mm beside it",
            remedy="the patient or table moved between slices: separate the parts",
        )
    sideways = step - (step @ normal) * normal
    angle = float(np.degrees(np.arctan2(np.linalg.norm(sideways), step @ normal)))
    straight = bool(np.linalg.norm(sideways) * (len(origins) - 1) <= beside or angle < 0.05)
    origin = origins[0]
    if straight and np.linalg.norm(sideways) > 1e-3 * gap:  # of rounding: else the grid would be called sheared
        step, origin = gap * normal, origin + sideways * (len(origins) - 1) / 2
    affine = np.eye(4)
    affine[:3, 0] = first.row * first.spacing[1]
    affine[:3, 1] = first.column * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = origin
    affine = _LPS_TO_RAS @ affine
    if straight:
        return volume_CDHW, affine
    if policy.tilt == "refuse":
        raise RefusedInput(
            thing,
            expected="slices stacked straight",
            found=f"a gantry tilt of {angle:.1f} degrees",
            remedy="set read.tilt to correct to resample it onto a straight grid",
        )
    notes.append(f"gantry tilt of {angle:.1f} degrees corrected by linear resampling onto a straight grid")
    return geometry.straighten(volume_CDHW, affine)


def _lattice(along: Affine, rounding: float, written: int) -> _Lattice | None:
    """The even grid that slices at `along` lie on, some places of it perhaps empty; None where there is none.

    Args:
        along: Positions in mm, growing.
        rounding: How far a written position may be off, in mm.
        written: Decimals of the positions.
    """
    gaps = np.diff(along)
    median = float(np.median(gaps))
    even = np.abs(gaps - median).max() <= max(POSITION_TOLERANCE * median, 2e-3)
    mean = float(along[-1] - along[0]) / len(gaps)
    if even and _off(along, mean, np.arange(len(along))) <= _EXACT_MM:
        return _Lattice(mean, np.arange(len(along)), float(along[0]))
    ones = np.ones(len(gaps), np.intp)
    # Without missing slices first: only what these cannot explain may be a missing one.
    for increments in (ones, *(np.rint(gaps / guess).astype(np.intp) for guess in (median, gaps.min(), mean))):
        numbers = np.concatenate([[0], np.cumsum(increments)])
        if increments.min() < 1:
            continue
        gap, best = _best_gap(along, numbers)
        if best > rounding + _EXACT_MM or rounding > _MOST_ROUNDED * gap + _EXACT_MM:
            continue
        # A gap with as few decimals as the positions would not have been rounded.
        for places in range(written + 1 if best > _EXACT_MM else 0, 9):
            near = [
                round(float(n) / 10**places, places) for n in (np.floor(gap * 10**places), np.ceil(gap * 10**places))
            ]
            simple = float(min((g for g in near if g > 0), key=lambda g: _off(along, g, numbers), default=gap))
            off = _off(along, simple, numbers)
            if off <= rounding + _EXACT_MM:
                return _Lattice(simple, numbers, _start(along, simple, numbers, rounding), off > _EXACT_MM)
    if even:
        return _Lattice(mean, np.arange(len(along)), float(along[0]))
    increments = np.rint(gaps / median).astype(np.intp)
    if increments.min() < 1 or np.abs(gaps / median - increments).max() >= 0.02:
        return None
    numbers = np.concatenate([[0], np.cumsum(increments)])
    return _Lattice(float(along[-1] - along[0]) / float(numbers[-1]), numbers, float(along[0]))


def _best_gap(along: Affine, numbers: npt.NDArray[np.intp]) -> tuple[float, float]:
    """The gap whose furthest slice is nearest to its grid, and how far off it is; that is convex in the gap."""
    low, high = (float(along[-1] - along[0]) / float(numbers[-1]) * share for share in (0.5, 1.5))
    for _ in range(100):
        third = (high - low) / 3
        if _off(along, low + third, numbers) <= _off(along, high - third, numbers):
            high -= third
        else:
            low += third
    gap = (low + high) / 2
    return gap, _off(along, gap, numbers)


def _off(along: Affine, gap: float, numbers: npt.NDArray[np.intp]) -> float:
    """How far the furthest slice lies from a grid of that gap, placed as well as can be."""
    rest = along - gap * numbers
    return float(rest.max() - rest.min()) / 2


def _start(along: Affine, gap: float, numbers: npt.NDArray[np.intp], rounding: float) -> float:
    """The first position as written where all others are then within rounding, else the best one."""
    rest = along - gap * numbers
    if np.abs(rest - along[0]).max() <= rounding + _EXACT_MM:
        return float(along[0])
    return float(rest.max() + rest.min()) / 2


def _even_gaps(
    thing: str,
    volume_CDHW: Array,
    origins: Affine,
    along: Affine,
    gap: float,
    lattice: _Lattice | None,
    policy: ReadPolicy,
    notes: list[str],
) -> tuple[Array, Affine]:
    gaps = np.diff(along)
    missing = 0 if lattice is None else int(lattice.numbers[-1]) + 1 - len(along)
    what = f"{missing} slices missing" if missing > 0 else f"gaps from {gaps.min():.3g} to {gaps.max():.3g} mm"
    gap = gap if lattice is None else lattice.gap
    if policy.gaps == "refuse" or gaps.max() > policy.max_gap_mm:
        remedy = "set read.gaps to resample to interpolate onto even gaps"
        if gaps.max() > policy.max_gap_mm:
            more = f"raise read.max_gap_mm above {policy.max_gap_mm:g} if interpolating so far is wanted"
            remedy = more if policy.gaps == "resample" else f"{remedy}, and {more}"
        raise RefusedInput(thing, expected=f"even gaps of {gap:.3g} mm between slices", found=what, remedy=remedy)
    if lattice is not None:  # slices that are there stay as they are
        count = int(lattice.numbers[-1]) + 1
        positions = lattice.numbers.astype(np.float64)
        even = np.arange(count, dtype=np.float64)
        gap_mm = lattice.gap
    else:
        count = max(2, round(float(along[-1] - along[0]) / gap) + 1)
        positions, even = along, np.linspace(along[0], along[-1], count)
        gap_mm = float(even[1] - even[0])
    low = np.clip(np.searchsorted(positions, even, side="right") - 1, 0, len(positions) - 2)
    weight = (even - positions[low]) / (positions[low + 1] - positions[low])
    out = np.empty((len(volume_CDHW), count, *volume_CDHW.shape[2:]), np.float32)
    for k, (at, w) in enumerate(zip(low, weight, strict=True)):
        out[:, k] = volume_CDHW[:, at] * np.float32(1 - w) + volume_CDHW[:, at + 1] * np.float32(w)
    notes.append(f"{what}: interpolated onto even gaps of {gap_mm:.4g} mm")
    return out, origins[low] * (1 - weight)[:, None] + origins[low + 1] * weight[:, None]
