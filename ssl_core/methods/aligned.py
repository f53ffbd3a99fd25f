"""aligned: restore hidden blocks, agree with another view place by place, and tell where each voxel lies."""

from itertools import permutations
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_core.config import LATER
from ssl_core.losses.cosine import distance, masked_mean, wide
from ssl_core.losses.restoration import Kind, restoration
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
from ssl_core.methods.parts.masking import block_mask
from ssl_core.methods.parts.points import sample_features, shared_points, voxel_positions
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.ema import follow, short_run_momentum, target_of
from ssl_core.networks.heads import Norm, PixelHead, head
from ssl_core.views.types import View, ViewBatch, ViewSpec


@register("aligned")
class Aligned(nn.Module):
    """Masked restoration, geometry-aligned local consistency and, where asked for, position, on shared views.

    Idea: restoration is the strongest single objective for segmentation, and local consistency helps most beside it
    (Consistent View Alignment, arXiv 2509.13846, won a 2025 challenge so). Two overlapping views of a scan are
    masked and restored. From the same views, whole, a head predicts at the same physical points what a slowly following
    network sees in the other view. With `w_position` the decoder also says of every voxel where in the scan it lies:
    anatomy is at about the same place in scans of one region, so the answer takes knowing it (anatomical positional
    embeddings, arXiv 2409.10291, tell distances between voxels so; fractions of the scan are our choice).

    Formula: L = `w_restore` R + `w_consistency` C + `w_position` P. R = mean over both views and their hidden voxels of
    the squared error. C = mean over `feature_levels` and both directions of the mean over shared points of
    |q(x1)[A1(m)] - sg z(x2)[A2(m)]|^2, unit vectors, in [0, 4]. P = mean over both views, their voxels inside the scan
    and the axes of the squared error of 4 (p - 1/2), p the voxel's place over the scan's length, from the masked views
    where there are any; to say the middle always costs about 4/3. The target's weights follow as those of `byol` do.

    Traps: those of `mae` (intensities near 0) and `pgl` (measured feature centres); views mirrored along D or H teach
    that front and back look alike, which they do not; comparing masked views (`consistency_sees`) saves a pass and was
    worse where measured; with `w_restore` = 0 and `w_position` = 0 levels deeper than those compared are not trained;
    a place means something only where scans show about the same part of the body, and none can be told of a view that
    may be mirrored, so `w_position` is refused with flips.

    Cost: two passes of the whole network, and to the compared levels two more and two of the target; a second copy of
    the encoder.

    Use it first for segmentation with few labels. Ablations: a weight of 0 takes its part out with its cost;
    `feature_levels` picks the levels; `consistency_sees` = masked compares the maps that restore. In this project's
    studies of CHAOS and left atria `w_position` = 1 with `w_consistency` = 0 and strong intensity changes gained most.
    """

    class Config(MethodConfig):
        """Settings of the aligned method; all weights are our choice where no source is named."""

        TINY = tiny_settings(block=4, hidden=16, out=8)

        crops: Crops = Field(
            default=Crops(scale=(1.0, 1.4), flip=(0.0, 0.0, 0.5), min_overlap=0.3, intensity="none"),
            description="Views; our choice: mirrored left-right only, measured on hippocampus; no intensity changes",
        )
        w_restore: float = Field(default=1.0, ge=0, description="Weight of restoration; CVA: 1 to 5")
        w_consistency: float = Field(
            default=2.0,
            ge=0,
            description="Weight of consistency; our choice, 1 to 4 not told apart on hippocampus (CVA: 0.5 to 1)",
        )
        w_position: float = Field(
            default=0.0,
            ge=0,
            description="Weight of the place of each voxel; our choice, 1 where scans show one region of the body",
            json_schema_extra=LATER,
        )
        ratio: float = Field(default=0.75, ge=0, lt=1, description="Share of blocks hidden; nnssl's MAE")
        block: int = Field(default=8, ge=1, description="Side of the blocks, voxels; our choice (nnssl's MAE: 16)")
        loss: Kind = Field(default="mse", description="Error of a voxel; our choice (CVA: huber)")
        consistency_sees: Literal["whole", "masked"] = Field(
            default="whole",
            description="Online views that are compared, as they are or masked; our choice, measured on hippocampus",
        )
        feature_levels: tuple[int, ...] | None = Field(
            default=None, description="Encoder levels compared; unset: deepest with 6 positions in-plane, our choice"
        )
        hidden: int = Field(default=512, ge=1, description="Hidden width of the heads; our choice (CVA: 2048 and 512)")
        out: int = Field(default=256, ge=1, description="Embedding width; our choice (CVA: 2048)")
        norm: Norm = Field(default="batch", description="Norm in the heads, over the global batch and positions; BYOL")
        ema_start: float = Field(
            default=0.99,
            ge=0,
            le=1,
            description="Momentum, on a cosine to 1, lower in the first steps; our choice (CVA: 0.995)",
        )

        @model_validator(mode="after")
        def _something_to_do(self) -> "Aligned.Config":
            if not (self.w_restore or self.w_consistency or self.w_position):
                raise ValueError("w_restore, w_consistency or w_position above 0")
            if self.w_position and max(self.crops.flip) > 0:
                raise ValueError("crops.flip of 0 with w_position: a mirrored view does not tell where it lies")
            if self.w_restore and not self.ratio:
                raise ValueError("ratio above 0 where something is to be restored")
            masked = self.ratio and (self.w_restore or self.consistency_sees == "masked")
            if masked and max(self.crops.size_DHW) <= self.block:
                raise ValueError(f"a block smaller than the view, which would be hidden whole, not {self.block}")
            return self

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        levels = config.feature_levels or (None,)
        self.compared = [level_for(backbone, config.crops.size_DHW, level) for level in levels]
        decodes = bool(config.w_restore or config.w_position)
        self.deepest = len(backbone.levels) - 1 if decodes else max(self.compared)
        if decodes:
            train_only(backbone, backbone.encoder_keys() + backbone.decoder_keys())
        else:
            train_only(backbone, [key for i in self.compared for key in backbone.level_keys(i)])
        if config.w_restore:
            self.restore = PixelHead(backbone.decoder_levels[-1], int(backbone.arguments.get("in_channels", 1)))
        if config.w_position:
            self.locate = PixelHead(backbone.decoder_levels[-1], 3)
        if config.w_consistency:
            channels = [backbone.levels[i].channels for i in self.compared]
            hidden, out = config.hidden, config.out
            self.projectors = nn.ModuleList(head([c, hidden, out], dense=True, norm=config.norm) for c in channels)
            self.predictors = nn.ModuleList(head([out, hidden, out], dense=True, norm=config.norm) for _ in channels)
            self.target_backbone, self.target_projectors = target_of(backbone), target_of(self.projectors)

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """Two overlapping crops of each sample, role `global`; what is restored is the clean copy."""
        return ViewSpec((config.crops.role("global", 2, keep_clean=True),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Terms `restoration`, `position` and `consistency`; monitors compared features' spread and shared points."""
        config, pair = self.config, views.roles["global"][:2]  # a composition may show more
        masks = [self._mask(view, views, ctx, v) for v, view in enumerate(pair)]
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        hides = config.w_restore > 0 or config.consistency_sees == "masked"
        if hides:
            maps = [
                self.backbone.features(torch.where(mask, 0.0, view.image_BCDHW), self.deepest)
                for mask, view in zip(masks, pair, strict=True)
            ]
        else:
            maps = [encode(self.backbone, view, ctx, self.deepest) for view in pair]
        if config.w_restore or config.w_position:
            decoded = [self.backbone.decode(features)[-1] for features in maps]
        if config.w_restore:
            terms["restoration"] = config.w_restore * self._restoration(pair, masks, decoded)
        if config.w_position:
            terms["position"] = config.w_position * self._position(pair, views.shape_B3, decoded)
        if config.w_consistency:
            if hides and config.consistency_sees == "whole":
                maps = [encode(self.backbone, view, ctx, max(self.compared)) for view in pair]
            consistency, monitors["shared_points"] = self._consistency(pair, maps, ctx, views.shape_B3)
            terms["consistency"] = config.w_consistency * consistency
        monitors["feature_std"] = spread(maps[0][self.compared[0]])
        return LossTerms(terms, monitors)

    def after_step(self, ctx: StepContext) -> None:
        """Moves the target towards the online network."""
        if not self.config.w_consistency:
            return
        momentum = short_run_momentum(ctx.step, ctx.max_steps, self.config.ema_start)
        follow(self.target_backbone, self.backbone, momentum)
        follow(self.target_projectors, self.projectors, momentum)

    def _mask(self, view: View, views: ViewBatch, ctx: StepContext, v: int) -> Tensor:
        if not self.config.ratio:
            return torch.zeros_like(view.valid_B1DHW, dtype=torch.bool)
        purpose = f"aligned {v}"
        return block_mask(ctx.seed, views.sample_B, view.size_DHW, self.config.block, self.config.ratio, purpose)

    def _restoration(self, pair: tuple[View, ...], masks: list[Tensor], decoded: list[Tensor]) -> Tensor:
        parts = []
        for view, mask, features in zip(pair, masks, decoded, strict=True):
            target = view.image_BCDHW if view.clean_BCDHW is None else view.clean_BCDHW
            parts.append(restoration(self.restore(features), target, mask * view.valid_B1DHW, self.config.loss))
        return torch.stack(parts).mean()

    def _position(self, pair: tuple[View, ...], shape_B3: Tensor, decoded: list[Tensor]) -> Tensor:
        parts = []
        for view, features in zip(pair, decoded, strict=True):
            target = 4 * (voxel_positions(view, shape_B3) - 0.5)
            output = wide(self.locate(features))
            parts.append(restoration(output, target.to(output.dtype), view.valid_B1DHW))
        return torch.stack(parts).mean()

    def _consistency(
        self, pair: tuple[View, ...], maps: list[list[Tensor]], ctx: StepContext, shape_B3: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target_maps = [encode(self.target_backbone, view, ctx, max(self.compared)) for view in pair]
        losses, shares = [], []
        for slot, i in enumerate(self.compared):
            level = self.backbone.levels[i]
            predictions = [self.predictors[slot](self.projectors[slot](m[i])) for m in maps]
            with torch.no_grad():
                targets = [self.target_projectors[slot](m[i]) for m in target_maps]
            d, h, w = predictions[0].shape[2:]
            *points, shared = shared_points(pair[0], pair[1], (int(d), int(h), int(w)), shape_B3)
            q = [sample_features(f, level, p) for f, p in zip(predictions, points, strict=True)]
            z = [sample_features(f, level, p) for f, p in zip(targets, points, strict=True)]
            mask = shared & q[0][1] & q[1][1]
            losses += [masked_mean(distance(q[a][0], z[b][0]), mask) for a, b in permutations(range(2))]
            shares.append(mask.to(losses[0].dtype).mean())
        return torch.stack(losses).mean(), torch.stack(shares).mean()
