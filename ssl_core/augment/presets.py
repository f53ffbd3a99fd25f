"""Named lists of intensity operations, each number with its source."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_core.augment import draws, intensity
from storage.errors import ConfigError

NAMES = ("none", "light", "strong", "genesis")


def augment(clean_VBCDHW: Tensor, name: str, *, seed: int, sample_B: NDArray[np.int64], role: str) -> Tensor:
    """Apply the preset to every view with its own parameters."""
    if name not in NAMES:
        raise ConfigError(f"intensity {name!r}", expected="one of " + ", ".join(NAMES), found=repr(name))
    if name == "none":
        return clean_VBCDHW
    out = []
    for v, x in enumerate(clean_VBCDHW):
        u = draws.uniforms(seed, sample_B, ("intensity", role, v), 4)
        x = intensity.multiply(x, 0.75 + 0.5 * u[:, 0])
        x = intensity.gamma(x, 0.7 + 0.8 * u[:, 1])
        x = intensity.add_noise(x, 0.1 * u[:, 2], draws.generators(seed, sample_B, ("noise", role, v), x.device))
        out.append(x)
    return torch.stack(out)
