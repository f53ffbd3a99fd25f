"""Sliding windows over a volume, slab by slab or as a whole, blended with Gaussian weights."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SIGMA = 0.125
"""Standard deviation of the Gaussian, as a share of the window."""


def padded(
    image_CDHW: NDArray[np.float32], least_DHW: tuple[int, ...], air_C: NDArray[np.float32], multiple: int = 1
) -> tuple[NDArray[np.float32], tuple[slice, ...]]:
    """Centre the volume in one of at least `least_DHW` voxels, filled with each channel's value of air.

    Training pads crops that stick out of a volume with air as well; zeros would be tissue to the network.

    Returns:
        The larger volume, and where the old one lies in it, (D, H, W) slices.
    """
    old = image_CDHW.shape[1:]
    new = [-(-max(n, least) // multiple) * multiple for n, least in zip(old, least_DHW, strict=True)]
    start = [(n - o) // 2 for n, o in zip(new, old, strict=True)]
    inside = tuple(slice(s, s + o) for s, o in zip(start, old, strict=True))
    if tuple(new) == old:
        return image_CDHW, inside
    larger = np.empty((image_CDHW.shape[0], *new), np.float32)
    larger[:] = air_C[:, None, None, None]
    larger[(slice(None), *inside)] = image_CDHW
    return larger, inside


Reader = Callable[[int, int], NDArray[np.float32]]
"""The network's input between two places along D, (C, stop - start, H, W)."""


def slide(
    network: Callable[[Tensor], Tensor],
    image_CDHW: NDArray[np.float32],
    air_C: NDArray[np.float32],
    window_DHW: tuple[int, int, int],
    *,
    device: torch.device,
    overlap: float = 0.5,
    batch: int = 4,
) -> Tensor:
    """Blended scores of a whole volume, (K, D, H, W) float32 on the CPU; see `slide_slabs`.

    Args:
        network: (B, C, *window) to (B, K, *window).
        image_CDHW: The network's input for the whole volume.
        air_C: Each channel's value of air.
        window_DHW: Window, voxels.
        device: Where windows are computed.
        overlap: Share of a window that its neighbour covers again.
        batch: Windows computed at once.
    """
    slabs = slide_slabs(
        network,
        lambda start, stop: image_CDHW[:, start:stop],
        image_CDHW.shape[1:],
        air_C,
        window_DHW,
        device=device,
        overlap=overlap,
        batch=batch,
    )
    return torch.cat([scores_KDHW.clone() for _, scores_KDHW in slabs], 1)


def slide_slabs(
    network: Callable[[Tensor], Tensor],
    read: Reader,
    shape_DHW: Sequence[int],
    air_C: NDArray[np.float32],
    window_DHW: tuple[int, int, int],
    *,
    device: torch.device,
    overlap: float = 0.5,
    batch: int = 4,
) -> Iterator[tuple[int, Tensor]]:
    """Blended scores of a volume, slab by slab along D, equal to the last bit to those of MONAI's sliding window.

    Windows go along D last. What is held is one window's depth of the volume: of the input, (C, window, H, W), and of
    the scores, (K, window, H, W). A slab is given out as soon as no window to come touches it.

    Args:
        network: (B, C, *window) to (B, K, *window).
        read: The input; each part is read once, in order.
        shape_DHW: Voxels of the volume.
        air_C: Each channel's value of air, with which a volume smaller than a window is padded.
        window_DHW: Window, voxels.
        device: Where windows are computed; what is blended stays on the CPU, whose memory is larger.
        overlap: Share of a window that its neighbour covers again.
        batch: Windows computed at once.

    Yields:
        The first place along D, and scores from there on, (K, n, H, W) float32 on the CPU, which the next step writes
        over.
    """
    size, inside = _room(shape_DHW, window_DHW)
    image = _Rolling(read, size, inside, air_C, window_DHW[0])
    blend = _Blend(gaussian(window_DHW), size)
    starts = [window_starts(n, w, overlap) for n, w in zip(size, window_DHW, strict=True)]
    corners = list(product(*starts))
    for first in range(0, len(corners), batch):
        group = corners[first : first + batch]
        x_BCDHW = torch.from_numpy(np.stack([image.window(corner, window_DHW) for corner in group]))
        with torch.inference_mode():
            scores_BKDHW = network(x_BCDHW.to(device))
            weighted_BKDHW = (scores_BKDHW * blend.weight.to(device)).cpu()
        for corner, one_KDHW in zip(group, weighted_BKDHW, strict=True):
            yield from _inside(blend.upto(corner[0]), inside)
            blend.add(corner, one_KDHW)
    yield from _inside(blend.upto(size[0]), inside)


def each_window(
    read: Reader,
    shape_DHW: Sequence[int],
    air_C: NDArray[np.float32],
    window_DHW: tuple[int, int, int],
    *,
    overlap: float = 0.5,
) -> Iterator[NDArray[np.float32]]:
    """The windows of `slide_slabs` one after another, (C, *window); of the input one window's depth is in memory.

    Args:
        read: The input; each part is read once, in order.
        shape_DHW: Voxels of the volume.
        air_C: Each channel's value of air, with which a volume smaller than a window is padded.
        window_DHW: Window, voxels.
        overlap: Share of a window that its neighbour covers again.
    """
    size, inside = _room(shape_DHW, window_DHW)
    image = _Rolling(read, size, inside, air_C, window_DHW[0])
    for corner in product(*(window_starts(n, w, overlap) for n, w in zip(size, window_DHW, strict=True))):
        yield image.window(corner, window_DHW)


def _room(shape_DHW: Sequence[int], window_DHW: Sequence[int]) -> tuple[list[int], tuple[slice, ...]]:
    """Voxels of a volume that holds a window, and where the given one lies in it."""
    size = [max(n, w) for n, w in zip(shape_DHW, window_DHW, strict=True)]
    before = [(s - n) // 2 for s, n in zip(size, shape_DHW, strict=True)]
    return size, tuple(slice(b, b + n) for b, n in zip(before, shape_DHW, strict=True))


def gaussian(window_DHW: Sequence[int]) -> Tensor:
    """Weight of each voxel of a window, (D, H, W) float32: MONAI's importance map, its smallest at least 0.001."""
    weight = torch.ones(())
    for n in window_DHW:
        place = torch.arange(-(n - 1) / 2.0, (n - 1) / 2.0 + 1, dtype=torch.float)
        weight = weight.unsqueeze(-1) * torch.exp(place**2 / (-2 * (n * _SIGMA) ** 2))
    return weight.clamp(min=max(float(weight.min()), 1e-3))


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of windows along an axis, each a step of `1 - overlap` after the other, the last flush with the end.

    Args:
        size: Voxels along the axis, at least `window`.
        window: Voxels of a window.
        overlap: Share of a window that its neighbour covers again.
    """
    if size == window:
        return [0]
    step = max(int(window * (1 - overlap)), 1)
    count = -(-(size - window) // step) + 1
    return [min(i * step, size - window) for i in range(count)]


class _Rolling:
    """The input of one window's depth, padded with air, moving along D."""

    def __init__(
        self,
        read: Reader,
        size: Sequence[int],
        inside: tuple[slice, ...],
        air_C: NDArray[np.float32],
        depth: int,
    ) -> None:
        self._read, self._inside, self._air = read, inside, air_C[:, None, None, None]
        self._rows = np.empty((len(air_C), depth, *size[1:]), np.float32)
        self._start, self._stop = 0, 0  # what is in it, along D

    def window(self, corner: tuple[int, ...], window_DHW: Sequence[int]) -> NDArray[np.float32]:
        """A copy of a window; corners come in ascending order along D."""
        self._move(corner[0])
        _, *plane = (slice(c, c + w) for c, w in zip(corner, window_DHW, strict=True))
        return self._rows[(slice(None), slice(None), *plane)].copy()

    def _move(self, start: int) -> None:
        depth = self._rows.shape[1]
        if (start, start + depth) == (self._start, self._stop):
            return
        rest = max(self._stop - start, 0)
        for row in range(rest):  # one at a time: no second copy of them all
            self._rows[:, row] = self._rows[:, row + depth - rest]
        self._rows[:, rest:] = self._air
        along, *plane = self._inside
        first, last = max(start + rest, along.start), min(start + depth, along.stop)
        if first < last:
            rows = slice(first - start, last - start)
            self._rows[(slice(None), rows, *plane)] = self._read(first - along.start, last - along.start)
        self._start, self._stop = start, start + depth


class _Blend:
    """Weighted sums of scores over one window's depth, moving along D."""

    def __init__(self, weight_DHW: Tensor, size: Sequence[int]) -> None:
        self.weight = weight_DHW
        self._total = torch.zeros(0)
        self._norm = torch.zeros(weight_DHW.shape[0], *size[1:])
        self._start = 0

    def add(self, corner: tuple[int, ...], weighted_KDHW: Tensor) -> None:
        """A window's scores times their weight; its corner is where the sums begin, or none were handed out before."""
        if self._total.numel() == 0:
            self._total = torch.zeros(weighted_KDHW.shape[0], *self._norm.shape)
        _, h, w = corner
        box = (slice(None), slice(h, h + self.weight.shape[1]), slice(w, w + self.weight.shape[2]))
        self._total[(slice(None), *box)] += weighted_KDHW
        self._norm[box] += self.weight

    def upto(self, stop: int) -> Iterator[tuple[int, Tensor]]:
        """What is complete below a place along D, with its first place; nothing where that has been handed out."""
        rows = stop - self._start
        if rows == 0:
            return
        self._total[:, :rows] /= self._norm[:rows]
        yield self._start, self._total[:, :rows]
        for sums in (self._total, self._norm[None]):
            depth = sums.shape[1]
            for row in range(rows, depth):
                sums[:, row - rows] = sums[:, row]
            sums[:, depth - rows :] = 0
        self._start = stop


def _inside(slabs: Iterator[tuple[int, Tensor]], inside: tuple[slice, ...]) -> Iterator[tuple[int, Tensor]]:
    """Slabs of the padded volume, without the padding."""
    along, *plane = inside
    for start, scores_KDHW in slabs:
        first, last = max(start, along.start), min(start + scores_KDHW.shape[1], along.stop)
        if first < last:
            yield first - along.start, scores_KDHW[(slice(None), slice(first - start, last - start), *plane)]


def slide_features(
    features: Callable[[Tensor], Tensor],
    image_CDHW: NDArray[np.float32],
    air_C: NDArray[np.float32],
    window_DHW: tuple[int, int, int],
    *,
    stride_DHW: tuple[int, int, int],
    device: torch.device,
) -> Tensor:
    """Blended features of a whole volume on the feature grid, (E, D/stride, H/stride, W/stride) float32.

    Windows start at multiples of the stride, so that features of neighbouring windows fall on one grid. The volume is
    padded with air at its far faces only: feature k keeps its place k * stride.

    Args:
        features: (B, C, *window) to (B, E, *window / stride).
        image_CDHW: The network's input for the whole volume.
        air_C: Each channel's value of air.
        window_DHW: Window, a multiple of `stride_DHW`.
        stride_DHW: Input voxels between features.
        device: Where windows are computed.
    """
    shape = image_CDHW.shape[1:]
    size = [max(w, -(-n // s) * s) for n, w, s in zip(shape, window_DHW, stride_DHW, strict=True)]
    larger = np.empty((image_CDHW.shape[0], *size), np.float32)
    larger[:] = air_C[:, None, None, None]
    larger[(slice(None), *(slice(0, n) for n in shape))] = image_CDHW
    steps = [w // s for w, s in zip(window_DHW, stride_DHW, strict=True)]
    weight = gaussian(steps)
    grid = [n // s for n, s in zip(size, stride_DHW, strict=True)]
    total, norm = torch.zeros(0), torch.zeros(grid)
    starts = [list(_starts(n, k)) for n, k in zip(grid, steps, strict=True)]
    with torch.inference_mode():
        for corner in product(*starts):
            box = tuple(slice(c, c + k) for c, k in zip(corner, steps, strict=True))
            voxels = tuple(slice(c * s, c * s + w) for c, s, w in zip(corner, stride_DHW, window_DHW, strict=True))
            maps = features(torch.from_numpy(larger[(slice(None), *voxels)])[None].to(device))[0].float().cpu()
            if total.numel() == 0:
                total = torch.zeros(maps.shape[0], *grid)
            total[(slice(None), *box)] += maps * weight
            norm[box] += weight
    inside = tuple(slice(0, -(-n // s)) for n, s in zip(shape, stride_DHW, strict=True))
    return (total / norm)[(slice(None), *inside)]


def _starts(cells: int, window: int) -> Iterator[int]:
    """Window starts along one axis, about half a window apart, the last one flush with the end."""
    last = cells - window
    count = -(-last // max(1, window // 2)) if last > 0 else 0
    for i in range(count + 1):
        yield round(i * last / count) if count else 0
