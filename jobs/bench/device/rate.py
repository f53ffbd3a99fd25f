"""How fast a machine convolves, and how many operations a training step needs: the two sides of a utilisation."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ssl_core.methods.base import LossTerms, StepContext
from ssl_core.views.types import ViewBatch

SHAPES: tuple[tuple[int, int], ...] = ((16, 64), (32, 48), (64, 32), (128, 24), (256, 12))
"""Channels and side of the cube that are tried; as in the levels of a U-Net on crops of 64 to 96 voxels."""


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, the device waited for."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def convolution_rate(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    shapes: Sequence[tuple[int, int]] | None = None,
    batch: int | None = None,
    repeats: int = 5,
) -> float:
    """Floating-point operations a second of 3x3x3 convolutions, forward and backward: the best of shapes and layouts.

    A multiplication and an addition count as two. The middle of `repeats` calls counts for each, after one that warms
    up. Both memory layouts are tried, so that a step in the slower one shows what it leaves.

    Args:
        device: Where.
        dtype: Of input, kernel and gradient.
        shapes: `SHAPES` when `None`.
        batch: Cubes at once; by default 1 on a CPU and 32 on an accelerator, which fewer leave idle.
        repeats: Calls that are measured.
    """
    count = batch or (1 if device.type == "cpu" else 32)
    best = 0.0
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        for channels, side in shapes or SHAPES:
            x = torch.randn(count, channels, side, side, side, device=device, dtype=dtype)
            weight = torch.randn(channels, channels, 3, 3, 3, device=device, dtype=dtype) / (27 * channels) ** 0.5
            leaves = [t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight)]
            both = partial(_both, leaves[0], leaves[1], torch.ones_like(x).contiguous(memory_format=layout))
            both()
            middle = statistics.median(seconds(both, device) for _ in range(repeats))
            best = max(best, 3 * 2 * 27 * channels**2 * count * side**3 / middle)
    return best


def _both(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(functional.conv3d(x, weight, padding=1), (x, weight), grad)


def step_operations(method: nn.Module, views: ViewBatch) -> float:
    """Floating-point operations of convolutions and matrix products in one forward and backward pass.

    Without those of recomputed activations. The method's gradients are cleared, and its running statistics and moving
    averages move on by this one pass: count on a method of its own.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        terms: LossTerms = method(views, StepContext(0, 1))
        torch.autograd.backward(terms.total)
    method.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())
