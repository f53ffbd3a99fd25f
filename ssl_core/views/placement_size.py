"""How large a host crop must be to hold every view, and whether its roles can be placed at all."""

import functools
import itertools

import numpy as np

from ssl_core.views.box_forms import concentric, elastic_margin, largest_stretch, linear_map, rotation, scale_of_axes
from ssl_core.views.boxes import F64, Boxes, iou
from ssl_core.views.types import RoleSpec, ViewSpec
from storage.errors import ConfigError

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
        margin = 2 * elastic_margin(role)
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
            shared = max((2 * overlap / (1 + overlap)) ** (1 / 3), 1 - MOST_SHIFT)
            need = np.maximum(need, box + other - shared * np.minimum(box, other) + margin)
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
            numbers = f"{role.rotate_degrees}, {role.elastic_vox}"
            raise ConfigError(thing, expected="rotation in [0, 180] degrees and no negative elastic_vox", found=numbers)
        if not 0 <= role.tilt_degrees <= 90 or not 0 <= role.stretch < 1:
            numbers = f"{role.tilt_degrees}, {role.stretch}"
            raise ConfigError(thing, expected="tilt_degrees in [0, 90] and stretch in [0, 1)", found=numbers)
        if not (0 <= role.scale_share <= 1 and 0 <= role.rotate_share <= 1):
            shares = f"{role.scale_share}, {role.rotate_share}"
            raise ConfigError(thing, expected="scale_share and rotate_share from 0 to 1", found=shares)
        if role.scale_share < 1 and not low <= 1 <= high:
            raise ConfigError(
                f"{thing}: scale", expected="1 within it where scale_share is below 1", found=str(role.scale)
            )
        if role.centred and (role.count > 1 or role.overlaps or role.offset_vox is not None):
            raise ConfigError(
                f"{thing}: centred",
                expected="one view of the role, which overlaps no other",
                found="several, or others",
            )
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


def _check_other(role: RoleSpec, roles: dict[str, RoleSpec]) -> None:
    thing = f"view role {role.name!r}"
    chain, name = {role.name}, role.overlaps
    while name:
        if name in chain or name not in roles:
            raise ConfigError(f"{thing}: overlaps", expected="another role, without a circle", found=repr(name))
        chain.add(name)
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
    most = _least_overlap(role, other)
    if most < role.min_overlap:
        raise ConfigError(
            f"{thing}: min_overlap",
            expected=f"at most {most:.3f}, which its sizes allow with any box of role {other.name!r}",
            found=str(role.min_overlap),
        )


@functools.lru_cache(maxsize=64)
def _least_overlap(role: RoleSpec, other: RoleSpec) -> float:
    """What `concentric` reaches at worst over scales, angles and stretches of the other role, at equal spacing."""
    turn, tilt = np.deg2rad(other.rotate_degrees), np.deg2rad(other.tilt_degrees)
    angles = itertools.product({0.0, turn / 2, turn}, {0.0, tilt}, {0.0, tilt})
    stretches = itertools.product(*({1 + most, 1 - most} for most in largest_stretch(other).tolist()))
    forms = np.array([
        (scale, *turned, *stretch)
        for scale, turned, stretch in itertools.product(np.linspace(*other.scale, 5), list(angles), list(stretches))
    ])  # fmt: skip
    even, free = np.ones((len(forms), 3)), np.full((len(forms), 3), 1e9)
    linear = linear_map(scale_of_axes(other, forms[:, 0]) * forms[:, 4:], forms[:, 1:4], even)
    anchor = Boxes(other.size_DHW, linear, np.zeros((len(forms), 3)))
    return float(iou(concentric(role, anchor, -free, free, even), anchor).min())


def _varies(role: RoleSpec) -> bool:
    return role.scale[0] < role.scale[1] or role.rotate_degrees + role.tilt_degrees + role.stretch > 0


def _upright(role: RoleSpec, scale: float) -> Boxes:
    """One box at the origin without rotation."""
    linear = linear_map(scale_of_axes(role, np.full(1, scale)), np.zeros((1, 3)), np.ones((1, 3)))
    return Boxes(role.size_DHW, linear, np.zeros((1, 3)))


def _largest(role: RoleSpec) -> F64:
    """Sides of the bounding box at the largest scale and the worst angles, volume voxels of equal spacing."""
    sides = np.array(role.size_DHW) * scale_of_axes(role, np.array([role.scale[1]]))[0] * (1 + largest_stretch(role))
    d, h, w = sides.tolist()
    return np.array(_worst(d, h, w, role.rotate_degrees, role.tilt_degrees))


@functools.lru_cache(maxsize=256)
def _worst(d: float, h: float, w: float, rotate_degrees: float, tilt_degrees: float) -> tuple[float, float, float]:
    # Mirrors leave the bounding box alone, and each turns two angles round: one sign is free, and 90 degrees suffice.
    tilts = np.deg2rad(np.linspace(0, tilt_degrees, 31 if tilt_degrees else 1))
    turns = np.deg2rad(np.linspace(0, min(rotate_degrees, 90.0), 31 if tilt_degrees else 181))
    grid = np.stack(np.meshgrid(turns, tilts, np.union1d(-tilts, tilts), indexing="ij"), axis=-1).reshape(-1, 3)
    x, y, z = (float(n) for n in (np.abs(rotation(grid)) @ np.array([d, h, w])).max(0))
    return x, y, z
