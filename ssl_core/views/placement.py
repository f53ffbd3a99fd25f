"""Where views are cut: boxes inside the host crop, drawn on the host in float64, a function of (seed, sample, role).

A box is the parallelepiped that a view shows: a linear map (scale, rotation in millimetres) of the view's voxels, and
the lower corner of its bounding box in volume voxels. All steps are vectorised over the batch, and no sample's draw
depends on another's.
"""

import functools
import itertools
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ssl_core.views.augment.draws import uniforms
from ssl_core.views.boxes import F64, Boxes, extents, iou, overlap_less
from ssl_core.views.types import RoleSpec, ViewSpec
from storage.errors import ConfigError

I64 = NDArray[np.int64]

ATTEMPTS = 64
"""Draws before the fallback; our choice. Measured on 20 000 pairs with scale 0.8 to 1.3, the fallback takes none at an
overlap of 0.3, 0.04 % at 0.5 and 14 % at 0.8."""
AT_ONCE = 128  # boxes drawn and compared in one go; changes the time only
MOST_SHIFT = 0.5  # our choice: boxes placed freely part by half a side at most, or host crops would grow eightfold


def host_size(spec: ViewSpec) -> tuple[int, int, int]:
    """Crop that holds every box that `draw` may choose, volume voxels.

    Two boxes with sides a and b that keep at least the intersection over union v need a + b - f min(a, b) voxels along
    an axis, f = (2v / (1 + v))^(1/3): the share of the overlap that each axis keeps when all lose alike.

    Raises:
        ConfigError: the roles contradict each other.
    """
    check(spec)
    roles = {role.name: role for role in spec.roles}
    need = np.zeros(3)
    for role in spec.roles:
        box = _largest(role)
        margin = 2 * _margin(role)
        if role.offset_vox is not None and role.count > 1:
            box = box + np.array([role.offset_vox[1] * (1 if role.count == 2 else 2), 0, 0])
            need = np.maximum(need, box + margin)
            continue
        need = np.maximum(need, box + margin)
        if role.inside_union:
            continue
        other = _largest(roles[role.overlaps]) if role.overlaps else box
        if role.count > 1 or role.overlaps:
            overlap = role.min_overlap
            kept = max((2 * overlap / (1 + overlap)) ** (1 / 3), 1 - MOST_SHIFT)
            need = np.maximum(need, box + other - kept * np.minimum(box, other) + margin)
    d, h, w = (int(x) for x in np.ceil(need - 1e-9))
    return d, h, w


def check(spec: ViewSpec) -> None:
    """Refuse roles that contradict themselves or each other.

    Raises:
        ConfigError: names the role and the field.
    """
    names = [role.name for role in spec.roles]
    if not names or len(set(names)) != len(names):
        raise ConfigError("view roles", expected="one or more roles with unique names", found=str(names))
    roles = {role.name: role for role in spec.roles}
    for role in spec.roles:
        thing = f"view role {role.name!r}"
        low, high = role.scale
        if role.count < 1 or min(role.size_DHW) < 1:
            raise ConfigError(thing, expected="count and size of at least 1", found=f"{role.count}, {role.size_DHW}")
        if not 0 < low <= high:
            raise ConfigError(f"{thing}: scale", expected="0 < lowest <= highest", found=str(role.scale))
        if not 0 <= role.min_overlap <= 1:
            raise ConfigError(f"{thing}: min_overlap", expected="a value in [0, 1]", found=str(role.min_overlap))
        if min(role.flip) < 0 or max(role.flip) > 1:
            raise ConfigError(f"{thing}: flip", expected="probabilities", found=str(role.flip))
        if not 0 <= role.rotate_degrees <= 180 or role.elastic_vox < 0:
            found = f"{role.rotate_degrees}, {role.elastic_vox}"
            raise ConfigError(thing, expected="rotation in [0, 180] degrees and no negative elastic_vox", found=found)
        if not 0 <= role.tilt_degrees <= 90 or not 0 <= role.stretch < 1:
            found = f"{role.tilt_degrees}, {role.stretch}"
            raise ConfigError(thing, expected="tilt_degrees in [0, 90] and stretch in [0, 1)", found=found)
        if role.offset_vox is not None:
            offset = role.offset_vox
            nearest, furthest = offset
            if not 0 <= nearest <= furthest:
                raise ConfigError(
                    f"{thing}: offset_vox", expected="0 <= nearest <= furthest", found=str(role.offset_vox)
                )
            if role.overlaps or role.min_overlap or role.inside_union:
                raise ConfigError(
                    thing, expected="offset_vox without overlap conditions", found="both", remedy="drop one of them"
                )
        if role.inside_union and not role.overlaps:
            raise ConfigError(f"{thing}: inside_union", expected="a role in `overlaps`", found="none")
        if role.overlaps:
            _check_other(role, roles)


def draw(
    spec: ViewSpec,
    *,
    seed: int,
    sample_B: NDArray[np.int64],
    start_B3: NDArray[np.int64],
    host_DHW: tuple[int, int, int],
    shape_B3: F64,
    spacing_B3: F64,
) -> dict[str, F64]:
    """Affine maps (count, B, 3, 4), float64, of every view of each role: view edge to volume edge coordinates.

    Boxes lie inside the host crop [start, start + host), and inside the volume [0, shape) along every axis where it is
    long enough; along a shorter axis they cover it.

    Args:
        spec: Roles to place.
        seed: Seed of the run.
        sample_B: Global sample indices, the only thing besides the seed that the randomness depends on.
        start_B3: First voxel of the host crops; may be negative.
        host_DHW: Size of the host crops, at least `host_size(spec)`.
        shape_B3: Volume shapes, voxels.
        spacing_B3: Voxel spacing, mm; rotations are rigid in millimetres.

    Raises:
        ConfigError: the host crop is too small, or the roles contradict each other.
    """
    need = host_size(spec)
    if any(have < want for have, want in zip(host_DHW, need, strict=True)):
        raise ConfigError(
            "host crop", expected=f"at least {need} voxels", found=str(tuple(host_DHW)), remedy="read host_size(spec)"
        )
    start, shape = np.asarray(start_B3, np.float64), np.asarray(shape_B3, np.float64)
    place = _Placer(seed, np.asarray(sample_B, np.int64), start, start + np.array(host_DHW, np.float64), shape,
                    np.asarray(spacing_B3, np.float64))  # fmt: skip
    boxes: dict[str, list[Boxes]] = {}
    pending = list(spec.roles)
    while pending:
        role = next(r for r in pending if not r.overlaps or r.overlaps in boxes)
        pending.remove(role)
        boxes[role.name] = place.role(role, boxes.get(role.overlaps, []))
    return {role.name: np.stack(place.affines(role, boxes[role.name])) for role in spec.roles}


@dataclass(frozen=True)
class _Placer:
    seed: int
    sample_B: NDArray[np.int64]
    host_low_B3: F64
    host_high_B3: F64
    shape_B3: F64
    spacing_B3: F64

    def role(self, role: RoleSpec, others: list[Boxes]) -> list[Boxes]:
        if role.offset_vox is not None:
            return self._shifted(role, role.offset_vox)
        low, high = self._host(role)
        if role.inside_union:
            low = np.maximum(low, np.min([box.low_B3 for box in others], axis=0))
            high = np.minimum(high, np.max([box.low_B3 + box.extent_B3 for box in others], axis=0))
        placed: list[Boxes] = []
        for view in range(role.count):
            anchors = others[:1] if role.overlaps else placed
            placed.append(self._one(role, view, anchors, low, high))
        return placed

    def _host(self, role: RoleSpec) -> tuple[F64, F64]:
        margin = _margin(role)
        return self.host_low_B3 + margin, self.host_high_B3 - margin

    def _one(self, role: RoleSpec, view: int, anchors: list[Boxes], low_B3: F64, high_B3: F64) -> Boxes:
        """The first attempt of each sample that overlaps enough, or the fallback."""
        chosen = self._candidate(role, view, None, low_B3, high_B3)
        if role.min_overlap == 0 or not anchors:
            return chosen
        open_N = np.flatnonzero(_unmet(role, chosen, anchors))
        done = 1
        while len(open_N) and done < ATTEMPTS:
            # Several attempts at once, the more the fewer samples are left: small arrays cost as much as larger ones.
            count = min(max(AT_ONCE // len(open_N), 1), ATTEMPTS - done)
            rows, attempts = np.tile(open_N, count), np.repeat(np.arange(done, done + count), len(open_N))
            tried = self._rows(rows)._candidate(role, view, attempts, low_B3[rows], high_B3[rows])
            unmet = _unmet(role, tried, [anchor.rows(rows) for anchor in anchors]).reshape(count, len(open_N))
            found = np.flatnonzero(~unmet.all(0))
            chosen = chosen.with_rows(open_N[found], tried.rows(unmet.argmin(0)[found] * len(open_N) + found))
            open_N, done = open_N[unmet.all(0)], done + count
        if not len(open_N):
            return chosen
        last = concentric(role, anchors[0], low_B3, high_B3, self.spacing_B3) if role.overlaps else anchors[0]
        return chosen.with_rows(open_N, last.rows(open_N))

    def _rows(self, index_N: NDArray[np.int64]) -> "_Placer":
        """The same for these samples only."""
        arrays = {f.name: getattr(self, f.name)[index_N] for f in fields(self) if f.name != "seed"}
        return _Placer(self.seed, **arrays)

    def _candidate(self, role: RoleSpec, view: int, attempt_B: I64 | None, low_B3: F64, high_B3: F64) -> Boxes:
        # Shared scale and angle stay the same over the attempts as well, or the views of a role would part.
        form, form_B = (0, None) if role.share_spatial else (view, attempt_B)
        shape_B2 = self._uniforms(role, "shape", form, form_B, count=2)
        lowest, highest = role.scale
        sides_B3 = _sides(role, lowest + (highest - lowest) * shape_B2[:, 0])
        turned_B3 = np.zeros_like(sides_B3)
        turned_B3[:, 0] = np.deg2rad(role.rotate_degrees) * (2 * shape_B2[:, 1] - 1)
        lowest_B3 = _sides(role, np.full(len(sides_B3), lowest))
        # Where a box does not fit (thick slices, a narrow union), give up tilt and stretch, rotation and scale in turn.
        forms = [(sides_B3, turned_B3), (sides_B3, 0 * turned_B3), (lowest_B3, 0 * turned_B3)]
        if role.tilt_degrees or role.stretch:
            more_B5 = 2 * self._uniforms(role, "tilt", form, form_B, count=5) - 1
            tilted_B3 = turned_B3.copy()
            tilted_B3[:, 1:] = np.deg2rad(role.tilt_degrees) * more_B5[:, :2]
            forms.insert(0, (sides_B3 * (1 + _stretch(role) * more_B5[:, 2:]), tilted_B3))
        linear = _linear(*forms[0], self.spacing_B3)
        for sides, angles in forms[1:]:
            tight_B = _tight(role, linear, high_B3 - low_B3)
            if not tight_B.any():
                break
            linear = np.where(tight_B[:, None, None], _linear(sides, angles, self.spacing_B3), linear)
        return Boxes(role.size_DHW, linear, self._corner(role, view, attempt_B, linear, low_B3, high_B3))

    def _corner(
        self,
        role: RoleSpec,
        view: int,
        attempt_B: I64 | None,
        linear_B33: F64,
        low_B3: F64,
        high_B3: F64,
        extra: float | F64 = 0.0,
    ) -> F64:
        extent = extents(linear_B33, role.size_DHW)
        extent[:, 0] += extra
        first, last = _corners(extent, low_B3, high_B3, self.shape_B3)
        u = self._uniforms(role, "corner", view, attempt_B, count=3)
        # Whole voxels where the axis is neither scaled nor turned, so that those views need no interpolation.
        whole = (extent == np.round(extent)) & (first == np.round(first)) & (last == np.round(last))
        low = np.where(whole, first + np.floor(u * (last - first + 1)), first + u * (last - first))
        least, most = self._host(role)
        return np.asarray(np.clip(low, least, np.maximum(least, most - extent)))

    def _shifted(self, role: RoleSpec, offset_vox: tuple[int, int]) -> list[Boxes]:
        nearest, furthest = offset_vox
        later = role.count - 1
        u = self._uniforms(role, "shift", 0, count=max(2 * later, 1))
        size = nearest + np.floor(u[:, :later] * (furthest - nearest + 1))
        shift = np.concatenate([np.zeros((len(u), 1)), np.where(u[:, later : 2 * later] < 0.5, -size, size)], axis=1)
        span = shift.max(1) - shift.min(1)
        least, most = self._host(role)
        # The box has to leave room for its shifts: a tilted one of thin slices may need all of the crop along D.
        form = self._candidate(role, 0, None, least, most - span[:, None] * [1, 0, 0]).linear_B33
        low = self._corner(role, 0, None, form, least, most, extra=span)
        low[:, 0] -= shift.min(1)
        steps = [low + np.stack([s, 0 * s, 0 * s], axis=1) for s in shift.T]
        return [Boxes(role.size_DHW, form, step) for step in steps]

    def affines(self, role: RoleSpec, boxes: list[Boxes]) -> list[F64]:
        maps = []
        for view, box in enumerate(boxes):
            u = self._uniforms(role, "flip", 0 if role.share_spatial else view, count=3)
            sign_B3 = np.where(u < np.array(role.flip), -1.0, 1.0)
            linear = box.linear_B33 * sign_B3[:, None, :]
            shift = box.centre_B3 - linear @ (np.array(role.size_DHW, np.float64) / 2)
            maps.append(np.concatenate([linear, shift[:, :, None]], axis=2))
        return maps

    def _uniforms(self, role: RoleSpec, what: str, view: int, attempt_B: I64 | None = None, *, count: int) -> F64:
        """Of the first attempt, or of each sample's own."""
        purpose = ("place", role.name, what, view)
        if attempt_B is None:
            return uniforms(self.seed, self.sample_B, (*purpose, 0), count)
        return uniforms(self.seed, self.sample_B, purpose, count, attempt_B)


def concentric(role: RoleSpec, anchor: Boxes, low_B3: F64, high_B3: F64, spacing_B3: F64) -> Boxes:
    """The box of `role` with the largest intersection over union with the anchor, about the anchor's centre.

    It is moved just so far that it lies in [low, high), which cannot lessen the overlap with an anchor that lies there.
    """
    lowest, highest = role.scale
    # The anchor's own scale and angles, so that boxes of one size can agree exactly.
    rigid = anchor.linear_B33 * spacing_B3[:, :, None] / spacing_B3[:, None, :]
    length_B3 = np.linalg.norm(rigid, axis=1)
    area = length_B3[:, 1] * length_B3[:, 2] * np.prod(anchor.size_DHW[1:]) / np.prod(role.size_DHW[1:])
    most = np.deg2rad([role.rotate_degrees, role.tilt_degrees, role.tilt_degrees])
    angles = np.clip(_angles(rigid / length_B3[:, None]), -most, most)
    same = np.zeros(len(spacing_B3))
    scales = [np.clip(np.sqrt(area), lowest, highest), *(same + scale for scale in np.linspace(lowest, highest, 9))]
    best: Boxes | None = None
    for scale_B in scales:
        linear = _linear(_sides(role, scale_B), angles, spacing_B3)
        tight_B = _tight(role, linear, high_B3 - low_B3)
        if tight_B.any():  # spacings of H and W that differ, or slices far apart
            upright = _linear(_sides(role, scale_B), 0 * angles, spacing_B3)
            linear = np.where(tight_B[:, None, None], upright, linear)
        extent = extents(linear, role.size_DHW)
        low = np.clip(anchor.centre_B3 - extent / 2, low_B3, np.maximum(low_B3, high_B3 - extent))
        box = Boxes(role.size_DHW, linear, low)
        best = box if best is None else box.where(iou(box, anchor) > iou(best, anchor), best)
    assert best is not None
    return best


def _tight(role: RoleSpec, linear_B33: F64, room_B3: F64) -> NDArray[np.bool_]:
    """Which boxes do not fit into the room, or deform beyond the margin that is kept around it, (B,)."""
    reach_B3 = role.elastic_vox * np.abs(linear_B33).sum(2)
    return np.asarray(
        ((extents(linear_B33, role.size_DHW) > room_B3 + 1e-9) | (reach_B3 > _margin(role) + 1e-9)).any(1)
    )


def _unmet(role: RoleSpec, box: Boxes, anchors: list[Boxes]) -> NDArray[np.bool_]:
    unmet = np.zeros(len(box.low_B3), bool)
    for anchor in anchors:
        unmet |= overlap_less(box, anchor, role.min_overlap)
    return unmet


def _sides(role: RoleSpec, scale_B: F64) -> F64:
    """Scale of each axis of the view, (B, 3)."""
    return np.stack([scale_B if role.scale_depth else np.ones_like(scale_B), scale_B, scale_B], axis=1)


def _stretch(role: RoleSpec) -> F64:
    """Largest relative change of each axis' scale."""
    return role.stretch * np.array([float(role.scale_depth), 1.0, 1.0])


def _linear(sides_B3: F64, angles_B3: F64, spacing_B3: F64) -> F64:
    """View voxels to volume voxels: scale each axis, then turn rigidly in millimetres."""
    turn = _rotation(angles_B3) * sides_B3[:, None, :]
    return np.asarray(turn * (spacing_B3[:, None, :] / spacing_B3[:, :, None]))


def _rotation(angles_B3: F64) -> F64:
    """Rotation about W, then H, then D, by angles (B, 3) ordered (D, H, W), radians; (B, 3, 3)."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles_B3).T, np.sin(angles_B3).T
    rows = [
        [cb * cc, -cb * sc, sb],
        [ca * sc + sa * sb * cc, ca * cc - sa * sb * sc, -sa * cb],
        [sa * sc - ca * sb * cc, sa * cc + ca * sb * sc, ca * cb],
    ]
    return np.stack([np.stack(row, axis=1) for row in rows], axis=1)


def _angles(rotation_B33: F64) -> F64:
    """The inverse of `_rotation` for tilts of up to 90 degrees, (B, 3)."""
    r = rotation_B33
    return np.stack([
        np.arctan2(-r[:, 1, 2], r[:, 2, 2]),
        np.arcsin(np.clip(r[:, 0, 2], -1, 1)),
        np.arctan2(-r[:, 0, 1], r[:, 0, 0]),
    ], axis=1)  # fmt: skip


def _corners(extent_B3: F64, low_B3: F64, high_B3: F64, shape_B3: F64) -> tuple[F64, F64]:
    """First and last lower corner of a box inside [low, high) that stays in, or else covers, the volume [0, shape)."""
    a, b = np.clip(0.0, low_B3, high_B3), np.clip(shape_B3, low_B3, high_B3)
    most = np.maximum(high_B3 - extent_B3, low_B3)
    first = np.clip(np.minimum(a, b - extent_B3), low_B3, most)
    last = np.clip(np.maximum(a, b - extent_B3), low_B3, most)
    return first, last


def _largest(role: RoleSpec) -> F64:
    """Sides of the bounding box at the largest scale and the worst angles, volume voxels of equal spacing."""
    sides = np.array(role.size_DHW) * _sides(role, np.array([role.scale[1]]))[0] * (1 + _stretch(role))
    d, h, w = sides.tolist()
    return np.array(_worst(d, h, w, role.rotate_degrees, role.tilt_degrees))


@functools.lru_cache(maxsize=256)
def _worst(d: float, h: float, w: float, rotate_degrees: float, tilt_degrees: float) -> tuple[float, float, float]:
    # Mirrors leave the bounding box alone, and each turns two angles round: one sign is free, and 90 degrees suffice.
    tilts = np.deg2rad(np.linspace(0, tilt_degrees, 31 if tilt_degrees else 1))
    turns = np.deg2rad(np.linspace(0, min(rotate_degrees, 90.0), 31 if tilt_degrees else 181))
    grid = np.stack(np.meshgrid(turns, tilts, np.union1d(-tilts, tilts), indexing="ij"), axis=-1).reshape(-1, 3)
    x, y, z = (float(n) for n in (np.abs(_rotation(grid)) @ np.array([d, h, w])).max(0))
    return x, y, z


def _margin(role: RoleSpec) -> F64:
    """Voxels beyond the box that an elastic deformation may reach, at equal spacing."""
    sides = _sides(role, np.array([role.scale[1]]))[0] * (1 + _stretch(role))
    if role.tilt_degrees:  # an axis of the volume may take part of all three of the view's, or of two
        sides = np.full(3, np.sqrt(3) * sides.max())
    elif role.rotate_degrees:
        sides = sides * np.array([1.0, np.sqrt(2), np.sqrt(2)])
    return np.asarray(np.ceil(role.elastic_vox * sides))


def _check_other(role: RoleSpec, roles: dict[str, RoleSpec]) -> None:
    thing = f"view role {role.name!r}"
    seen, name = {role.name}, role.overlaps
    while name:
        if name in seen or name not in roles:
            raise ConfigError(f"{thing}: overlaps", expected="another role, without a circle", found=repr(name))
        seen.add(name)
        name = roles[name].overlaps
    other = roles[role.overlaps]
    if role.inside_union:
        least, room = _upright(role, role.scale[0]).extent_B3[0], _upright(other, other.scale[0]).extent_B3[0]
        if (least > room).any() or role.elastic_vox > other.elastic_vox:
            raise ConfigError(
                f"{thing}: inside_union",
                expected=f"boxes that fit into the smallest of role {other.name!r} and deform no more than it",
                found=f"{least.tolist()} voxels in {room.tolist()}",
            )
    if role.min_overlap == 0:
        return
    if role.share_spatial and role.count > 1 and _varies(role):
        raise ConfigError(
            thing,
            expected="views that may each scale to meet their overlap with another role",
            found="share_spatial",
            remedy="drop share_spatial, or fix scale and rotation",
        )
    found = _least_overlap(role, other)
    if found < role.min_overlap:
        raise ConfigError(
            f"{thing}: min_overlap",
            expected=f"at most {found:.3f}, which its sizes allow with any box of role {other.name!r}",
            found=str(role.min_overlap),
        )


@functools.lru_cache(maxsize=64)
def _least_overlap(role: RoleSpec, other: RoleSpec) -> float:
    """What `concentric` reaches at worst over scales, angles and stretches of the other role, at equal spacing."""
    turn, tilt = np.deg2rad(other.rotate_degrees), np.deg2rad(other.tilt_degrees)
    angles = itertools.product({0.0, turn / 2, turn}, {0.0, tilt}, {0.0, tilt})
    stretches = itertools.product(*({1 + most, 1 - most} for most in _stretch(other).tolist()))
    forms = np.array([
        (scale, *turned, *stretch)
        for scale, turned, stretch in itertools.product(np.linspace(*other.scale, 5), list(angles), list(stretches))
    ])  # fmt: skip
    even, free = np.ones((len(forms), 3)), np.full((len(forms), 3), 1e9)
    linear = _linear(_sides(other, forms[:, 0]) * forms[:, 4:], forms[:, 1:4], even)
    anchor = Boxes(other.size_DHW, linear, np.zeros((len(forms), 3)))
    return float(iou(concentric(role, anchor, -free, free, even), anchor).min())


def _varies(role: RoleSpec) -> bool:
    return role.scale[0] < role.scale[1] or role.rotate_degrees + role.tilt_degrees + role.stretch > 0


def _upright(role: RoleSpec, scale: float) -> Boxes:
    """One box at the origin without rotation."""
    linear = _linear(_sides(role, np.full(1, scale)), np.zeros((1, 3)), np.ones((1, 3)))
    return Boxes(role.size_DHW, linear, np.zeros((1, 3)))
