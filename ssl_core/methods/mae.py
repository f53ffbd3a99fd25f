"""MAE on convolutional networks: restore hidden blocks of a crop from the rest."""

import torch
from pydantic import Field, model_validator
from torch import nn

from ssl_core.losses.restoration import Kind, restoration
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    register,
    spread,
    tiny_settings,
    train_only,
)
from ssl_core.methods.parts.masking import block_mask
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.heads import PixelHead
from ssl_core.views.types import ViewBatch, ViewSpec


@register("mae")
class MAE(nn.Module):
    """Masked auto-encoding (He et al., arXiv 2111.06377) with a dense U-Net, as nnssl trains it.

    Idea: to fill in hidden blocks a network has to know anatomy; the strongest control for segmentation.

    Formula: L = mean over hidden voxels that show the volume of (f(x with hidden voxels set to 0) - x)^2.

    Traps: intensities must be centred near 0, as hidden voxels are set to 0; loss on seen voxels teaches copying, so
    they do not count, nor does padding; convolutions see the mask's edges.

    Cost: one pass of the whole network a step, one view, no copy.

    Use it as the baseline to beat. The encoder is exported; the trained decoder stays in the checkpoint.
    """

    class Config(MethodConfig):
        """Settings of MAE."""

        TINY = tiny_settings(block=4)

        crops: Crops = Field(default=Crops(intensity="none"), description="The view; no intensity changes, as nnssl")
        ratio: float = Field(default=0.75, gt=0, lt=1, description="Share of blocks hidden; nnssl's 75 %")
        block: int = Field(default=16, ge=1, description="Side of the blocks, voxels; nnssl's 16")
        loss: Kind = Field(default="mse", description="Error of a voxel; nnssl's L2")

        @model_validator(mode="after")
        def _a_block_is_seen(self) -> "MAE.Config":
            if max(self.crops.size_DHW) <= self.block:
                raise ValueError(f"a block smaller than the view, which would be hidden whole, not {self.block}")
            return self

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        train_only(backbone, backbone.encoder_keys() + backbone.decoder_keys())
        self.restore = PixelHead(backbone.decoder_levels[-1], int(backbone.arguments.get("in_channels", 1)))

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """One crop of each sample, role `global`."""
        return ViewSpec((config.crops.role("global", 1),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Term `restoration`; monitors the spread of the deepest features."""
        view = views.roles["global"][0]
        hidden = block_mask(ctx.seed, views.sample_B, view.size_DHW, self.config.block, self.config.ratio, "mae")
        maps = self.backbone.features(torch.where(hidden, 0.0, view.image_BCDHW))
        output = self.restore(self.backbone.decode(maps)[-1])
        loss = restoration(output, view.image_BCDHW, hidden * view.valid_B1DHW, self.config.loss)
        return LossTerms({"restoration": loss}, {"feature_std": spread(maps[-1])})
