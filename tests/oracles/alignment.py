"""Slow float64 references for view geometry, written from the equations with loops and no tensors' help.

Edge coordinates, axes (D, H, W): a view shows u = a + (b - a) r', r' = 1 - r on flipped axes, of the box [a, b), where
r is the relative position inside the view.
"""

import itertools

import numpy as np


def shared_points(boxes, flips, sizes, points, shape=None):
    """Common points of two axis-aligned boxes, in view voxels of each; None when they do not overlap.

    Args:
        boxes: Two pairs (a, b) of corners.
        flips: Two triples of bools.
        sizes: Two view sizes.
        points: Points along each axis.
        shape: Of the volume that the points have to lie in; anywhere when None.
    """
    low = [max(boxes[0][0][i], boxes[1][0][i]) for i in range(3)]
    high = [min(boxes[0][1][i], boxes[1][1][i]) for i in range(3)]
    if shape is not None:
        low, high = [max(x, 0) for x in low], [min(x, n) for x, n in zip(high, shape, strict=True)]
    if any(high[i] <= low[i] for i in range(3)):
        return None
    out = ([], [])
    for m in itertools.product(*(range(n) for n in points)):
        u = [low[i] + (high[i] - low[i]) * (m[i] + 0.5) / points[i] for i in range(3)]
        for view in range(2):
            (a, b), row = boxes[view], []
            for i in range(3):
                r = (u[i] - a[i]) / (b[i] - a[i])
                row.append((1 - r if flips[view][i] else r) * sizes[view][i])
            out[view].append(row)
    return np.array(out[0]), np.array(out[1])


def trilinear(array_CDHW, k):
    """Value of an array at a fractional index, from its eight neighbours; nan outside of them."""
    shape = array_CDHW.shape[1:]
    if any(not 0 <= k[i] <= shape[i] - 1 for i in range(3)):
        return np.full(len(array_CDHW), np.nan)
    base = [min(int(np.floor(k[i])), max(shape[i] - 2, 0)) for i in range(3)]
    value = np.zeros(len(array_CDHW))
    for corner in itertools.product((0, 1), repeat=3):
        weight = 1.0
        for i in range(3):
            t = k[i] - base[i]
            weight *= t if corner[i] else 1 - t
        if weight:
            value += weight * array_CDHW[:, base[0] + corner[0], base[1] + corner[1], base[2] + corner[2]]
    return value


def place(affine, voxel, shape):
    """Where the centre of a view's voxel lies in its volume, a fraction of each side."""
    return [(sum(affine[i][j] * (voxel[j] + 0.5) for j in range(3)) + affine[i][3]) / shape[i] for i in range(3)]


def averaging_encoder(array_CDHW, axis, depth, taps):
    """`depth` averaging layers of stride 2 along one axis; of 3 taps with padding 1 (extrapolated) or of 2 taps."""
    x = np.moveaxis(np.asarray(array_CDHW, np.float64), axis + 1, -1)
    for _ in range(depth):
        if taps == 3:
            before, after = 2 * x[..., :1] - x[..., 1:2], 2 * x[..., -1:] - x[..., -2:-1]
            x = np.concatenate([before, x, after], axis=-1)
            n = (x.shape[-1] - 3) // 2 + 1
        else:
            n = x.shape[-1] // 2
        x = sum(x[..., t : t + 2 * n - 1 : 2] for t in range(taps)) / taps
    return np.moveaxis(x, -1, axis + 1)
