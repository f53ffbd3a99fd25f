"""BYOL: one crop of a scan predicts what a slowly following network makes of the other."""

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_core.losses.cosine import distance
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    encode,
    register,
    spread,
    tiny_settings,
    train_only,
)
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.ema import follow, short_run_momentum, target_of
from ssl_core.networks.heads import Norm, head
from ssl_core.views.types import ViewBatch, ViewSpec


@register("byol")
class BYOL(nn.Module):
    """BYOL (Grill et al., arXiv 2006.07733) on volumes; a global control without negatives.

    Idea: an online network predicts the embedding that a moving average of itself gives to another crop of the scan.

    Formula: L = mean of |q(x1) - sg z(x2)|^2 + |q(x2) - sg z(x1)|^2 with unit vectors, in [0, 8]; weights of the target
    move as xi <- m xi + (1 - m) theta, m on a cosine from `ema_start` to 1, and at most (1 + k) / (10 + k) at step k.

    Traps: nothing but the predictor, the moving average and the norms keeps it from collapsing, so watch `feature_std`;
    m = 0.996 over a few hundred steps leaves the target near its random start.

    Cost: per view one online and one target encoder pass; a second copy of the weights.

    Use it as the global control beside PGL, which is the same without pooling.
    """

    class Config(MethodConfig):
        """Settings of BYOL."""

        TINY = tiny_settings(hidden=16, out=8)

        crops: Crops = Field(default=Crops(min_overlap=0.3), description="Views; overlap our choice")
        hidden: int = Field(default=1024, ge=1, description="Hidden width of the heads; our choice (BYOL: 4096)")
        out: int = Field(default=256, ge=1, description="Embedding width; BYOL's 256")
        norm: Norm = Field(default="batch", description="Norm in the heads, over the global batch; BYOL")
        ema_start: float = Field(
            default=0.99,
            ge=0,
            le=1,
            description="Momentum, on a cosine to 1, lower in the first steps; our choice (BYOL: 0.996)",
        )

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        train_only(backbone, backbone.level_keys(len(backbone.levels) - 1))
        self.projector = head([backbone.levels[-1].channels, config.hidden, config.out], norm=config.norm)
        self.predictor = head([config.out, config.hidden, config.out], norm=config.norm)
        self.target_backbone, self.target_projector = target_of(backbone), target_of(self.projector)

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """Two crops of each sample, role `global`."""
        return ViewSpec((config.crops.role("global", 2),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Term `prediction`; monitors the spread of the deepest features."""
        pair = views.roles["global"][:2]  # a composition may show more
        maps = [encode(self.backbone, view, ctx)[-1] for view in pair]
        with torch.no_grad():
            targets = [self.target_projector(_pool(encode(self.target_backbone, v, ctx)[-1])) for v in pair]
        predictions = [self.predictor(self.projector(_pool(m))) for m in maps]
        loss = distance(predictions[0], targets[1]).mean() + distance(predictions[1], targets[0]).mean()
        return LossTerms({"prediction": loss}, {"feature_std": spread(maps[0])})

    def after_step(self, ctx: StepContext) -> None:
        """Moves the target towards the online network."""
        momentum = short_run_momentum(ctx.step, ctx.max_steps, self.config.ema_start)
        follow(self.target_backbone, self.backbone, momentum)
        follow(self.target_projector, self.projector, momentum)


def _pool(feature_BCDHW: Tensor) -> Tensor:
    return feature_BCDHW.mean((2, 3, 4))
