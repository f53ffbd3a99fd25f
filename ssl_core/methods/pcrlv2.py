"""PCRLv2: restore pixels and compare siamese features at several scales of a U-Net without skips."""

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ssl_core.losses.cosine import siamese
from ssl_core.losses.restoration import restoration
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    clean_of,
    register,
    spread,
    tiny_settings,
    train_only,
)
from ssl_core.networks.backbone import Backbone, Level
from ssl_core.networks.batch_norm import GlobalBatchNorm
from ssl_core.networks.heads import PixelHead, head
from ssl_core.views.augment.draws import uniforms
from ssl_core.views.types import View, ViewBatch, ViewSpec


def mid_weight(done: float) -> float:
    """beta = (1 + cos(pi e / E)) / 2 at the fraction e / E of the run (authors' code)."""
    return (1 + math.cos(math.pi * done)) / 2


class _Level(nn.Module):
    """Heads of one decoder level: embedding, its prediction, and a coarse restoration."""

    def __init__(self, level: Level, channels: int) -> None:
        super().__init__()
        c = level.channels
        self.embed = GlobalBatchNorm(c)
        self.predict = head([c, 2 * c, c])
        self.conv = nn.Conv3d(c, channels, 3, padding=1)
        self.norm = GlobalBatchNorm(channels)
        self.stride = level.stride_DHW

    def forward(self, feature_BCDHW: Tensor) -> tuple[Tensor, Tensor]:
        """`pro` and `pre`, (B, C)."""
        # Samples' means are nearly alike: rounded to 16 bits, what the norm makes of their differences is noise.
        pooled = feature_BCDHW.mean((2, 3, 4), dtype=torch.promote_types(feature_BCDHW.dtype, torch.float32))
        pro = self.embed(pooled)
        return pro, self.predict(pro)


def _restored(heads: nn.Module, feature_BCDHW: Tensor) -> Tensor:
    """A level's image at the input's resolution, in [0, 1]."""
    assert isinstance(heads, _Level)
    image = torch.sigmoid(heads.norm(heads.conv(feature_BCDHW)))
    size = [n * s for n, s in zip(image.shape[2:], heads.stride, strict=True)]
    return functional.interpolate(image, size=size, mode="trilinear", align_corners=False)


@register("pcrlv2")
class PCRLv2(nn.Module):
    """Preservational contrastive learning, version 2 (Zhou et al., arXiv 2301.00772); loss as in the authors' code.

    Idea: comparison keeps semantics, restoration keeps detail; do both at several scales. Without skips the decoder
    cannot copy and has to mean something; skips return at fine-tuning. Small local crops are compared as well.

    Formula: S(a, b) = -(cos(pre_a, sg pro_b) + cos(pre_b, sg pro_a)) / 2 with pro the normalised pooled map of a
    decoder level and pre its prediction; L = MSE(out(x1), gt1) + beta MSE(mid_l(x1), gt1) + S_l(x1, x2)
    + 1/(2K) sum over local crops v of (S_l(x1, v) + S_l(x2, v)), beta on a cosine from 1 to 0.

    Traps: the target is taken before the intensity changes and has to lie in [0, 1], which the output's sigmoid
    reaches; batches of one leave the embeddings' batch norm nothing to compare; fine-tuning without skips is poor;
    comparing needs batch norm in the network, as the code's has (`norm_name: batch` of `dynunet`): instance norms
    leave pooled maps of all samples nearly alike, and in our runs nothing was learned from them.

    Cost: two passes of the whole network and one over K small crops; no copy, no queue. The crop read from a volume has
    to hold every turned box: 126 x 187 x 188 voxels by default, 69 x 160 x 160 without tilt and stretch.

    Use it where both classification and segmentation matter.
    """

    class Config(MethodConfig):
        """Settings of PCRLv2."""

        TINY = tiny_settings(local={"size_DHW": (8, 8, 8)})

        crops: Crops = Field(
            default=Crops(
                size_DHW=(32, 64, 64),
                scale=(1.0, 1.75),
                scale_depth=True,
                flip=(0.0, 0.0, 0.5),
                rotate_degrees=10.0,
                tilt_degrees=10.0,
                stretch=0.1,
                min_overlap=0.3,
                intensity="pcrlv2",
            ),
            description="The two global views; sizes, overlap, flip, rotation about all axes and stretch after the"
            " code, which draws one of four sizes",
        )
        local: Crops = Field(
            default=Crops(
                size_DHW=(16, 16, 16),
                scale=(0.5, 2.0),
                scale_depth=True,
                flip=(0.0, 0.0, 0.5),
                rotate_degrees=10.0,
                tilt_degrees=10.0,
                stretch=0.1,
                intensity="pcrlv2_local",
            ),
            description="The local crops, inside the union of the global ones; sizes, flip, rotation and stretch after"
            " the code",
        )
        locals: int = Field(default=6, ge=1, description="Local crops, K; code: 6")
        scales: int = Field(default=3, ge=1, description="Finest decoder levels compared, at most; code: 3")
        levels: Literal["all", "draw"] = Field(
            default="all", description="Mean over the levels, or one drawn for each comparison (code); our choice"
        )
        target: Literal["view_range", "as_is"] = Field(
            default="view_range", description="Clean view scaled to [0, 1] by its own range, or as it is; our choice"
        )

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        train_only(backbone, backbone.level_keys(len(backbone.levels) - 1) + backbone.decoder_keys())
        channels = int(backbone.arguments.get("in_channels", 1))
        self.heads = nn.ModuleList(_Level(level, channels) for level in backbone.decoder_levels[-config.scales :])
        self.restore = PixelHead(backbone.decoder_levels[-1], channels)

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """Two crops, role `global`, the first with its clean copy, and K small ones, role `local`."""
        return ViewSpec(
            (
                config.crops.role("global", 2, keep_clean=True),
                config.local.role("local", config.locals, overlaps="global", inside_union=True),
            )
        )

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Terms `restoration`, `mid`, `siamese` and `local`; monitors the spread of the finest embedding."""
        first, second = views.roles["global"][:2]  # a composition may show more
        maps = [self._decode(view.image_BCDHW) for view in (first, second)]
        embedded = [[h(m) for h, m in zip(self.heads, ms, strict=True)] for ms in maps]
        target = _target(first) if self.config.target == "view_range" else clean_of(first)
        output = torch.sigmoid(self.restore(maps[0][-1]))
        # The mid-level restoration uses the level of the global comparison.
        weights = self._weights(ctx, 0)
        mids = [
            weight * restoration(_restored(h, m), target, first.valid_B1DHW)
            for h, m, weight in zip(self.heads, maps[0], weights, strict=True)
            if weight
        ]
        crops = views.roles["local"]
        small = self._decode(torch.cat([view.image_BCDHW for view in crops]))
        local = [[part.chunk(len(crops)) for part in h(m)] for h, m in zip(self.heads, small, strict=True)]
        comparisons = []
        for k in range(len(crops)):
            crop = [(pro[k], pre[k]) for pro, pre in local]
            for v in range(2):
                comparisons.append(_compare(embedded[v], crop, self._weights(ctx, 1 + 2 * k + v)))
        terms = {
            "restoration": restoration(output, target, first.valid_B1DHW),
            "mid": mid_weight(ctx.step / max(ctx.max_steps, 1)) * torch.stack(mids).sum(),
            "siamese": _compare(embedded[0], embedded[1], weights),
            "local": torch.stack(comparisons).mean(),
        }
        return LossTerms(terms, {"feature_std": spread(embedded[0][-1][0][:, :, None])})

    def _decode(self, image: Tensor) -> list[Tensor]:
        return self.backbone.decode(self.backbone.features(image), skips=False)[-len(self.heads) :]

    def _weights(self, ctx: StepContext, draw: int) -> list[float]:
        count = len(self.heads)
        if self.config.levels == "all":
            return [1 / count] * count
        # One draw a step for all samples and ranks, as in the code.
        u = uniforms(ctx.seed, np.array([ctx.step], np.int64), ("pcrlv2 level", draw), 1)[0, 0]
        return [float(i == int(u * count)) for i in range(count)]


def _compare(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]], weights: list[float]) -> Tensor:
    parts = [
        weight * siamese(pre_a, pro_a, pre_b, pro_b)
        for (pro_a, pre_a), (pro_b, pre_b), weight in zip(a, b, weights, strict=True)
        if weight
    ]
    return torch.stack(parts).sum()


def _target(view: View) -> Tensor:
    clean = clean_of(view)
    flat = clean.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    shape = (-1, 1, 1, 1, 1)
    return (clean - low.view(shape)) / (high - low).clamp_min(1e-6).view(shape)
