"""PGL: the same place should look the same in two views."""

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_core.losses.cosine import distance, masked_mean
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    encode,
    level_for,
    register,
    spread,
    tiny_settings,
    train_only,
)
from ssl_core.methods.parts.points import sample_features, shared_points
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.ema import follow, short_run_momentum, target_of
from ssl_core.networks.heads import Norm, head
from ssl_core.views.types import View, ViewBatch, ViewSpec


@register("pgl")
class PGL(nn.Module):
    """Prior-guided local self-supervision (Xie et al., arXiv 2011.12640), re-implemented from the described method.

    Idea: the crop, scale and flip that made each view are known, so the region that two views share is too. Sample
    both feature maps at the same physical points of that region and let an online network predict, point by point,
    what a slowly following target network sees there in the other view.

    Formula: L(1->2) = mean over points m of |q(x1)[A1(m)] - sg z(x2)[A2(m)]|^2 with unit vectors over channels at
    every point, that is 2 - 2 cos; L = L(1->2) + L(2->1), in [0, 8]. Points in the padding or outside either
    map's outermost feature centres are left out; a pair without shared points contributes 0. The target's weights
    follow as those of `byol` do.

    Traps: strided convolutions centre features half a voxel from the corner of their cell, not in its middle, so
    flipped views are mis-registered by up to a whole cell unless the measured offset is used; the mean squared error
    over channels is this loss divided by the number of channels; the loss cannot tell collapse from success, so watch
    `feature_std`. Levels deeper than the chosen one are not trained unless `w_global` is positive.

    Cost: per view one online and one target encoder pass; a second copy of encoder and projector.

    Use it where the same place must be recognised at voxel resolution; best together with reconstruction
    (see `aligned`).
    """

    class Config(MethodConfig):
        """Settings of PGL."""

        TINY = tiny_settings(hidden=16, out=8)

        crops: Crops = Field(
            default=Crops(scale=(1.1, 1.4), min_overlap=0.1),
            description="Views; 110 to 140 % boxes, 10 % overlap and flips with probability 1/2 as re-implemented",
        )
        feature_level: int | None = Field(
            default=None,
            ge=0,
            description="Encoder level compared; unset: deepest with 6 positions in-plane, our choice",
        )
        hidden: int = Field(default=1024, ge=1, description="Hidden width of projector and predictor; our choice")
        out: int = Field(default=256, ge=1, description="Embedding width; BYOL's 256")
        norm: Norm = Field(default="batch", description="Norm in the heads, over the global batch and positions; BYOL")
        ema_start: float = Field(
            default=0.99,
            ge=0,
            le=1,
            description="Momentum, on a cosine to 1, lower in the first steps; our choice for short runs (BYOL: 0.996)",
        )
        w_global: float = Field(default=0.0, ge=0, description="Weight of BYOL's loss on pooled features; our choice")

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.level = level_for(backbone, config.crops.size_DHW, config.feature_level)
        deepest = backbone.level_keys(len(backbone.levels) - 1) if config.w_global else []
        train_only(backbone, backbone.level_keys(self.level) + deepest)
        channels = backbone.levels[self.level].channels
        self.projector = head([channels, config.hidden, config.out], dense=True, norm=config.norm)
        self.predictor = head([config.out, config.hidden, config.out], dense=True, norm=config.norm)
        self.target_backbone, self.target_projector = target_of(backbone), target_of(self.projector)
        if config.w_global:
            channels = backbone.levels[-1].channels
            self.global_projector = head([channels, config.hidden, config.out], norm=config.norm)
            self.global_predictor = head([config.out, config.hidden, config.out], norm=config.norm)
            self.target_global_projector = target_of(self.global_projector)

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """Two overlapping crops of each sample, role `global`."""
        return ViewSpec((config.crops.role("global", 2),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Term `local`, and `global` when weighted; monitors the share of points compared and the feature spread."""
        config, pair = self.config, views.roles["global"][:2]  # a composition may show more
        upto = None if config.w_global else self.level
        online = [encode(self.backbone, view, ctx, upto) for view in pair]
        with torch.no_grad():
            target = [encode(self.target_backbone, view, ctx, upto) for view in pair]
        local, share = self._local(pair, online, target, views.shape_B3)
        terms = {"local": local}
        if config.w_global:
            terms["global"] = config.w_global * self._global(online, target)
        return LossTerms(terms, {"shared_points": share, "feature_std": spread(online[0][self.level])})

    def after_step(self, ctx: StepContext) -> None:
        """Moves the target towards the online network."""
        momentum = short_run_momentum(ctx.step, ctx.max_steps, self.config.ema_start)
        follow(self.target_backbone, self.backbone, momentum)
        follow(self.target_projector, self.projector, momentum)
        if self.config.w_global:
            follow(self.target_global_projector, self.global_projector, momentum)

    def _local(
        self, pair: tuple[View, ...], online: list[list[Tensor]], target: list[list[Tensor]], shape_B3: Tensor
    ) -> tuple[Tensor, Tensor]:
        level = self.backbone.levels[self.level]
        predicted = [self.predictor(self.projector(maps[self.level])) for maps in online]
        with torch.no_grad():
            targets = [self.target_projector(maps[self.level]) for maps in target]
        d, h, w = predicted[0].shape[2:]
        points = shared_points(pair[0], pair[1], (int(d), int(h), int(w)), shape_B3)
        q = [sample_features(f, level, p) for f, p in zip(predicted, points[:2], strict=True)]
        z = [sample_features(f, level, p) for f, p in zip(targets, points[:2], strict=True)]
        mask = points[2] & q[0][1] & q[1][1]
        forth = masked_mean(distance(q[0][0], z[1][0]), mask)
        back = masked_mean(distance(q[1][0], z[0][0]), mask)
        return forth + back, mask.to(forth.dtype).mean()

    def _global(self, online: list[list[Tensor]], target: list[list[Tensor]]) -> Tensor:
        q = [self.global_predictor(self.global_projector(maps[-1].mean((2, 3, 4)))) for maps in online]
        with torch.no_grad():
            z = [self.target_global_projector(maps[-1].mean((2, 3, 4))) for maps in target]
        return distance(q[0], z[1]).mean() + distance(q[1], z[0]).mean()
