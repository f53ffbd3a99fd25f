"""Named lists of intensity operations, each number with its source, and their batched application.

Every view takes each operation with its own probability and parameters, which depend on (seed, sample, role, view,
operation) only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_core.to_device import to_device
from ssl_core.views.augment import draws, intensity, paint
from storage.errors import ConfigError

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Op:
    """One operation of a preset.

    Attributes:
        kind: Name in `KINDS`.
        p: Probability for each view.
        low: Lower end of the uniform range of the parameter, where there is one.
        high: Upper end.
        source: Where the numbers come from.
        halves: Whether half of the parameters lie below 1 and half above, each half uniform, whatever the range.
    """

    kind: str
    p: float
    low: float = 0.0
    high: float = 0.0
    source: str = "our choice"
    halves: bool = False


_PGL = "PGL (Xie et al., arXiv 2011.12640), second-hand"
_GENESIS = "Models Genesis (Zhou et al.), as configured in nnssl"
_PCRL = "PCRLv2 (Zhou et al., arXiv 2301.00772), authors' code"
_NNUNET = "nnU-Net v2 (Isensee et al. 2021), `nnUNetTrainer.get_training_transforms`; of one channel"

PRESETS: dict[str, tuple[Op, ...]] = {
    "none": (),
    "light": (
        Op("noise_variance", 0.1, 0.0, 0.1, _PGL),
        Op("blur", 0.2, 0.5, 1.0, _PGL),
        Op("multiply", 0.5, 0.75, 1.25, _PGL),
        Op("gamma", 0.5, 0.7, 1.5, _PGL),
    ),
    # The same operations, more often and wider, for contrastive methods.
    "strong": (
        Op("noise_variance", 0.3, 0.0, 0.1),
        Op("blur", 0.3, 0.5, 1.5),
        Op("multiply", 0.8, 0.6, 1.4),
        Op("contrast", 0.8, 0.6, 1.4),
        Op("gamma", 0.8, 0.5, 2.0),
    ),
    # nnU-Net blurs half the channels of a fifth of its patches, and coarsens half of those of a quarter: of one channel
    # that is a tenth and an eighth. Channels of a view share their parameters here, and a blur has one width.
    "nnunet": (
        Op("noise_variance", 0.1, 0.0, 0.1, _NNUNET),
        Op("blur", 0.1, 0.5, 1.0, _NNUNET),
        Op("brightness", 0.15, 0.75, 1.25, _NNUNET, halves=True),
        Op("contrast", 0.15, 0.75, 1.25, _NNUNET, halves=True),
        Op("coarsen", 0.125, 0.5, 1.0, _NNUNET),
        Op("gamma_inverted", 0.1, 0.7, 1.5, _NNUNET, halves=True),
        Op("gamma_restored", 0.3, 0.7, 1.5, _NNUNET, halves=True),
    ),
    "genesis": (
        Op("shuffle", 0.5, source=_GENESIS),
        Op("curve", 0.9, source=_GENESIS),
        Op("paint", 0.9, source=_GENESIS),
    ),
    # On images in [0, 1]; noise is therefore in units of the range here.
    "pcrlv2": (
        Op("blur", 1.0, 0.0, 2.0, _PCRL),
        Op("noise_of_range", 1.0, 0.0, 0.25, _PCRL),
        Op("log_gamma", 1.0, -0.3, 0.3, _PCRL),
        Op("swap", 1.0, source=_PCRL),
        Op("standardise", 1.0, source=_PCRL),
    ),
}
PRESETS["pcrlv2_local"] = tuple(op for op in PRESETS["pcrlv2"] if op.kind != "swap")

SWAP_BLOCK_DHW, SWAP_PAIRS = (4, 4, 8), 100
"""PCRLv2, authors' code: patches of 8 x 4 x 4 (x, y, z), 100 exchanges in a view of 64 x 64 x 32."""

OUT_PAINTING = 0.8
"""Models Genesis: share of painted views that are painted outside of the windows."""

Generators = Callable[[], list[torch.Generator]]
Kind = Callable[[Tensor, F64, F64, Generators], Tensor]


def _paint(x: Tensor, value: F64, u: F64, make: Generators) -> Tensor:
    d, h, w = x.shape[2:]
    outer = u[:, -1] < OUT_PAINTING
    low, high = paint.windows(u[:, :-1], (d, h, w), outer)
    return paint.paint(x, low, high, outer, make())


# An operation gets its views, the drawn parameter (N,), `EXTRA` further uniforms (N, K), and one generator a view on
# demand, for the operations that draw a number for each voxel.
EXTRA = {"curve": 5, "paint": paint.PAINT_DRAWS + 1, "shuffle": 6, "swap": 3}
KINDS: dict[str, Kind] = {
    "noise_variance": lambda x, value, u, make: intensity.add_noise(x, np.sqrt(value), make()),
    "noise_of_range": lambda x, value, u, make: intensity.add_noise(x, value, make(), of_range=True),
    "blur": lambda x, value, u, make: intensity.blur(x, value),
    "multiply": lambda x, value, u, make: intensity.multiply(x, value),
    "contrast": lambda x, value, u, make: intensity.contrast(x, value),
    "gamma": lambda x, value, u, make: intensity.gamma(x, value),
    "brightness": lambda x, value, u, make: x * intensity.column(value, x),
    "coarsen": lambda x, value, u, make: intensity.coarsen(x, value),
    "gamma_restored": lambda x, value, u, make: intensity.gamma_restored(x, value),
    "gamma_inverted": lambda x, value, u, make: -intensity.gamma_restored(-x, value),
    "log_gamma": lambda x, value, u, make: intensity.gamma(x, np.exp(value)),
    "standardise": lambda x, value, u, make: intensity.standardise(x),
    "curve": lambda x, value, u, make: intensity.curve(x, intensity.bezier(u[:, :4], u[:, 4] < 0.5)),
    "paint": _paint,
    "shuffle": lambda x, value, u, make: paint.shuffle(x, u, make()),
    "swap": lambda x, value, u, make: paint.swap(x, u, make(), SWAP_BLOCK_DHW, SWAP_PAIRS),
}


def augment(clean_VBCDHW: Tensor, name: str, *, seed: int, sample_B: NDArray[np.int64], role: str) -> Tensor:
    """Apply the preset `name` to V views of B samples, each with its own parameters; the input is left as it is.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"intensity {name!r}", expected="one of " + ", ".join(PRESETS), found=repr(name))
    count, batch = clean_VBCDHW.shape[:2]
    clean = clean_VBCDHW.flatten(0, 1)
    x = clean
    for op in PRESETS[name]:
        purposes: list[tuple[str | int, ...]] = [("intensity", role, view, op.kind) for view in range(count)]
        u = np.concatenate([draws.uniforms(seed, sample_B, p, 2 + EXTRA.get(op.kind, 0)) for p in purposes])
        rows = np.flatnonzero(u[:, 0] < op.p)
        if not len(rows):
            continue
        value = _value(op, u[rows, 1])
        make = partial(_generators, seed, sample_B, purposes, rows, x.device)
        if len(rows) == count * batch:
            x = KINDS[op.kind](x, value, u[:, 2:], make)
            continue
        index = to_device(rows, x.device)
        changed = KINDS[op.kind](x[index], value, u[rows, 2:], make)
        x = (x.clone() if x is clean else x).index_copy_(0, index, changed)
    return x.reshape(clean_VBCDHW.shape)


def _value(op: Op, u_N: F64) -> F64:
    """The parameter from a uniform number."""
    if not op.halves:
        return np.asarray(op.low + (op.high - op.low) * u_N)
    return np.where(u_N < 0.5, op.low + (1 - op.low) * 2 * u_N, 1 + (op.high - 1) * (2 * u_N - 1))


def _generators(
    seed: int,
    sample_B: NDArray[np.int64],
    purposes: list[tuple[str | int, ...]],
    rows: NDArray[np.int64],
    device: torch.device,
) -> list[torch.Generator]:
    view, sample = np.divmod(rows, len(sample_B))
    generators: list[torch.Generator] = []
    for v, purpose in enumerate(purposes):
        generators += draws.generators(seed, sample_B[sample[view == v]], (*purpose, "voxels"), device)
    return generators
