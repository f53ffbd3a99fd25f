"""The forms that a role's boxes may take: scale, rotation and stretch as one linear map, and the margin around it.

A form maps the view's voxels to volume voxels; with the lower corner of its bounding box it is a box.
"""

import numpy as np
from numpy.typing import NDArray

from ssl_core.views.boxes import F64, Boxes, extents, iou
from ssl_core.views.types import RoleSpec


def scale_of_axes(role: RoleSpec, scale_B: F64) -> F64:
    """Scale of each axis of the view, (B, 3)."""
    return np.stack([scale_B if role.scale_depth else np.ones_like(scale_B), scale_B, scale_B], axis=1)


def largest_stretch(role: RoleSpec) -> F64:
    """Largest relative change of each axis' scale."""
    return role.stretch * np.array([float(role.scale_depth), 1.0, 1.0])


def linear_map(sides_B3: F64, angles_B3: F64, spacing_B3: F64) -> F64:
    """View voxels to volume voxels: scale each axis, then turn rigidly in millimetres."""
    turn = rotation(angles_B3) * sides_B3[:, None, :]
    return np.asarray(turn * (spacing_B3[:, None, :] / spacing_B3[:, :, None]))


def rotation(angles_B3: F64) -> F64:
    """Rotation about W, then H, then D, by angles (B, 3) ordered (D, H, W), radians; (B, 3, 3)."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles_B3).T, np.sin(angles_B3).T
    rows = [
        [cb * cc, -cb * sc, sb],
        [ca * sc + sa * sb * cc, ca * cc - sa * sb * sc, -sa * cb],
        [sa * sc - ca * sb * cc, sa * cc + ca * sb * sc, ca * cb],
    ]
    return np.stack([np.stack(row, axis=1) for row in rows], axis=1)


def angles_of(rotation_B33: F64) -> F64:
    """The inverse of `rotation` for tilts of up to 90 degrees, (B, 3)."""
    r = rotation_B33
    return np.stack([
        np.arctan2(-r[:, 1, 2], r[:, 2, 2]),
        np.arcsin(np.clip(r[:, 0, 2], -1, 1)),
        np.arctan2(-r[:, 0, 1], r[:, 0, 0]),
    ], axis=1)  # fmt: skip


def elastic_margin(role: RoleSpec) -> F64:
    """Voxels beyond the box that an elastic deformation may reach, at equal spacing."""
    sides = scale_of_axes(role, np.array([role.scale[1]]))[0] * (1 + largest_stretch(role))
    if role.tilt_degrees:  # an axis of the volume may take part of all three of the view's, or of two
        sides = np.full(3, np.sqrt(3) * sides.max())
    elif role.rotate_degrees:
        sides = sides * np.array([1.0, np.sqrt(2), np.sqrt(2)])
    return np.asarray(np.ceil(role.elastic_vox * sides))


def does_not_fit(role: RoleSpec, linear_B33: F64, room_B3: F64) -> NDArray[np.bool_]:
    """Which boxes do not fit into the room, or deform beyond the margin that is kept around it, (B,)."""
    reach_B3 = role.elastic_vox * np.abs(linear_B33).sum(2)
    return np.asarray(
        ((extents(linear_B33, role.size_DHW) > room_B3 + 1e-9) | (reach_B3 > elastic_margin(role) + 1e-9)).any(1)
    )


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
    angles = np.clip(angles_of(rigid / length_B3[:, None]), -most, most)
    same = np.zeros(len(spacing_B3))
    scales = [np.clip(np.sqrt(area), lowest, highest), *(same + scale for scale in np.linspace(lowest, highest, 9))]
    best: Boxes | None = None
    for scale_B in scales:
        linear = linear_map(scale_of_axes(role, scale_B), angles, spacing_B3)
        tight_B = does_not_fit(role, linear, high_B3 - low_B3)
        if tight_B.any():  # spacings of H and W that differ, or slices far apart
            upright = linear_map(scale_of_axes(role, scale_B), 0 * angles, spacing_B3)
            linear = np.where(tight_B[:, None, None], upright, linear)
        extent = extents(linear, role.size_DHW)
        low = np.clip(anchor.centre_B3 - extent / 2, low_B3, np.maximum(low_B3, high_B3 - extent))
        box = Boxes(role.size_DHW, linear, low)
        best = box if best is None else box.where(iou(box, anchor) > iou(best, anchor), best)
    assert best is not None
    return best
