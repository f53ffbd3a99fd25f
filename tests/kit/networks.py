"""The smallest form of every backbone, and a volume that it takes."""

from typing import Any

import torch

from ssl_core.networks import Backbone

SMALL: dict[str, dict[str, Any]] = {
    "basic_unet": {"features": (4, 4, 8, 8, 8, 4)},
    "unet": {"channels": (4, 8, 8), "strides": (2, 2), "num_res_units": 1},
    "dynunet": {"filters": (4, 8, 8), "strides": (1, 2, 2), "kernel_size": (3, 3, 3)},
    "segresnet": {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)},
    "plain_unet": {"n_conv_per_stage": 1, "features_per_stage": (4, 8, 8)},
    "resenc": {"n_blocks_per_stage": (1, 1, 1), "features_per_stage": (4, 8, 8)},
    "swin_unetr": {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2},
}


def volume(backbone: Backbone, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 1, *(2 * s for s in backbone.multiple_DHW()), generator=torch.Generator().manual_seed(1))
