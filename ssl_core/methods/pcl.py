"""PCL: slices or sub-volumes at the same height of the body attract, others repel."""

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_core.losses.contrast import Denominator, multi_positive_nce, near
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    Temperature,
    encode,
    register,
    spread,
    tiny_settings,
    train_only,
)
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.heads import Norm, head
from ssl_core.views.types import View, ViewBatch, ViewSpec


def position_contrast(
    embedded: list[Tensor],
    views: tuple[View, ...],
    batch: ViewBatch,
    ctx: StepContext,
    threshold: float,
    temperature: float,
    denominator: Denominator,
) -> tuple[Tensor, Tensor]:
    """PCL's loss over the views of all ranks, and the mean number of positives of an anchor.

    Args:
        embedded: (B, E) of each view.
        views: The views; position along D defines the positives.
        batch: Which the views are of.
        ctx: For gathering.
        threshold: Largest difference of position, a fraction of the volume, exclusive.
        temperature: t.
        denominator: See `multi_positive_nce`.
    """
    gather, b = ctx.collectives.gather, len(batch)
    length_B = batch.shape_B3[:, 0]
    centres = [view.position_B3[:, 0] * length_B for view in views]
    keys = torch.cat([gather(z) for z in embedded])
    key_centre = torch.cat([gather(c) for c in centres])
    key_length = gather(length_B).repeat(len(views))
    joined = b * ctx.collectives.world
    source = torch.arange(joined, device=keys.device).repeat(len(views))
    own = ctx.collectives.rank * b + torch.arange(b, device=keys.device)
    itself = torch.cat([own + v * joined for v in range(len(views))])
    close = near(torch.cat(centres), length_B.repeat(len(views)), key_centre, key_length, threshold)
    # Views of one sample are positives of each other however their boxes were placed.
    positive = close | (source[itself][:, None] == source[None, :])
    other = itself[:, None] != torch.arange(len(keys), device=keys.device)
    loss = multi_positive_nce(torch.cat(embedded), keys, positive, other, temperature, denominator)
    return loss, (positive & other).sum(1).to(loss.dtype).mean()


@register("pcl")
class PCL(nn.Module):
    """Positional contrastive learning (Zeng et al., arXiv 2106.09157); loss and settings as in the authors' code.

    Idea: the same organ occurs in every scan, so ordinary contrast has many false negatives. Two slices are positives
    when their positions along the body, as fractions of their volumes, differ by less than a threshold.

    Formula: with unit embeddings of the N slices' two views, L = mean over i of -1/|P_i| sum over j in P_i of
    log( exp(s_ij / t) / sum over a != i of exp(s_ia / t) ), P_i = { j != i : |p_i - p_j| < threshold or j is the other
    view of i }, p the centre over the length, (i + 1/2) / n for slice i of n (code: (i + 1) / n).
    `denominator = "pos_neg"` keeps only the one positive and the negatives below the line.

    Traps: positions mean something only when all scans show about the same part of the body in the same direction, so
    never flip along D; slices exactly `threshold` apart flip with rounding unless compared as integers, which is done
    here; overlapping sub-volumes must not be negatives, so choose threshold >= thickness / length; needs many samples.

    Cost: one encoder pass a view, no decoder, no copy; embeddings and positions of all ranks are gathered.

    Use it for the very few labels regime on data of one body region; 2-D as in the paper with crops of one slice and a
    2-D backbone, or on sub-volumes.
    """

    class Config(MethodConfig):
        """Settings of PCL."""

        TINY = tiny_settings(hidden=16, out=8)

        crops: Crops = Field(
            default=Crops(flip=(0.0, 0.5, 0.5)),
            description="Views; mirrored in-plane as in the code, which also turns, scales and deforms two of three and"
            " has no intensity changes: those are our choice",
        )
        threshold: float = Field(default=0.1, gt=0, description="Largest difference of position; code: 0.1 and 0.35")
        temperature: Temperature = Field(default=0.1, description="t; code, with its scale t/0.07 left out")
        denominator: Denominator = Field(default="all", description="Below the line; code: all")
        hidden: int = Field(default=256, ge=1, description="Hidden width; our choice (code: that of the features)")
        out: int = Field(default=512, ge=1, description="Embedding width; code: 512")
        norm: Norm = Field(default="none", description="Norm in the head; code: none")

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        train_only(backbone, backbone.level_keys(len(backbone.levels) - 1))
        self.projector = head([backbone.levels[-1].channels, config.hidden, config.out], norm=config.norm)

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """Two views of the same box, role `slice`."""
        return ViewSpec((config.crops.role("slice", 2, offset_vox=(0, 0)),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Term `position`; monitors positives of an anchor and the spread of the deepest features."""
        config, pair = self.config, views.roles["slice"]
        maps = [encode(self.backbone, view, ctx)[-1] for view in pair]
        embedded = [self.projector(m.mean((2, 3, 4))) for m in maps]
        loss, positives = position_contrast(
            embedded, pair, views, ctx, config.threshold, config.temperature, config.denominator
        )
        return LossTerms({"position": loss}, {"positives": positives, "feature_std": spread(maps[0])})
