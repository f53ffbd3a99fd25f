"""Models Genesis: undo non-linear intensity changes, local shuffling and in- or out-painting."""

from pydantic import Field
from torch import nn

from ssl_core.losses.restoration import restoration
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    clean_of,
    encode,
    register,
    spread,
    tiny_settings,
    train_only,
)
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.heads import PixelHead
from ssl_core.views.types import ViewBatch, ViewSpec


@register("models_genesis")
class ModelsGenesis(nn.Module):
    """Models Genesis (Zhou et al., MICCAI 2019) with nnssl's probabilities of the corruptions.

    Idea: restore a crop from a corrupted copy; each corruption asks for appearance, texture or context.

    Formula: L = mean over voxels that show the volume of (f(corrupted x) - x)^2.

    Traps: the target is taken after the spatial and before the intensity changes; skips let intact voxels be copied.

    Cost: one pass of the whole network a step, one view, no copy.

    Use it as the second restoration control. The encoder is exported; the trained decoder stays in the checkpoint.
    """

    class Config(MethodConfig):
        """Settings of Models Genesis."""

        TINY = tiny_settings()

        crops: Crops = Field(
            default=Crops(intensity="genesis"),
            description="The view; curve 0.9, shuffle 0.5, painting 0.9 as nnssl; flips our choice (nnssl: 0.4)",
        )

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        train_only(backbone, backbone.encoder_keys() + backbone.decoder_keys())
        self.restore = PixelHead(backbone.decoder_levels[-1], int(backbone.arguments.get("in_channels", 1)))

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """One corrupted crop of each sample with its clean copy, role `global`."""
        return ViewSpec((config.crops.role("global", 1, keep_clean=True),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Term `restoration`; monitors the spread of the deepest features."""
        view = views.roles["global"][0]
        maps = encode(self.backbone, view, ctx)
        output = self.restore(self.backbone.decode(maps)[-1])
        loss = restoration(output, clean_of(view), view.valid_B1DHW)
        return LossTerms({"restoration": loss}, {"feature_std": spread(maps[-1])})
