"""A signature is that of its definition, to the last bit: records of before are compared with those of now."""

import numpy as np
import pytest

from storage.ingest.signature import EDGE, FREQUENCIES, GRID, ORDERS, SPREADS, signature
from tests.kit.scans import phantom


def defined(channel_DHW: np.ndarray, low: float, high: float) -> np.ndarray:
    edge = low + EDGE * (high - low)
    weights = []
    for axis in range(3):
        counts = np.count_nonzero(channel_DHW > edge, axis=tuple(a for a in range(3) if a != axis))
        planes, total = np.arange(len(counts)), max(int(counts.sum()), 1)
        centre = float(counts @ (planes + 0.5)) / total
        spread = np.sqrt(float(counts @ (planes + 0.5 - centre) ** 2) / total + 1 / 12)
        edges = centre + spread * SPREADS * np.linspace(-1, 1, GRID + 1)
        weights.append(np.diff(np.clip(edges[:, None] - planes, 0, 1), axis=0) / (edges[1] - edges[0]))
    grid = np.zeros((GRID, GRID, GRID))
    rows, columns = weights[1].astype(np.float32), weights[2].T.astype(np.float32)
    for plane, weight in zip(channel_DHW, weights[0].T, strict=True):
        above = np.maximum(plane.astype(np.float32) - np.float32(edge), np.float32(0))
        grid += weight[:, None, None] * (rows @ above @ columns)
    values = np.where(grid > 1e-6 * grid.max(), grid, 0).reshape(-1)
    ordered = np.sort(values)
    ranks = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    cosines = np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * (np.arange(GRID) + 0.5) / GRID)
    cosines[0] *= np.sqrt(0.5)
    centred = (ranks - ranks.mean()).reshape(grid.shape)
    spectrum = np.einsum("ia,jb,kc,abc->ijk", cosines, cosines, cosines, centred, optimize=True)
    coefficients = spectrum[tuple(ORDERS.T)] * ORDERS.sum(1) ** 2
    return np.rint(coefficients * (127 / np.abs(coefficients).max())).astype(np.int8)


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64, np.uint8])
def test_a_signature_is_that_of_its_definition(dtype: type) -> None:
    scan = phantom((20, 26, 22)).astype(np.float64)
    channel = ((scan - scan.min()) * (250 / np.ptp(scan))).astype(dtype)
    before = channel.copy()
    coefficients = signature(channel, 10.0, 240.0)
    np.testing.assert_array_equal(channel, before)
    np.testing.assert_array_equal(coefficients, defined(channel, 10.0, 240.0))
    assert np.abs(coefficients).max() == 127
