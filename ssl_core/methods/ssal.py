"""SSAL-style: every place in one slice has its match in a near slice, and slices know their height."""

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_core.losses.alignment import windowed_alignment
from ssl_core.losses.contrast import Denominator
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    Temperature,
    encode,
    level_for,
    register,
    spread,
    tiny_settings,
    train_only,
)
from ssl_core.methods.pcl import position_contrast
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.heads import Norm, head
from ssl_core.views.types import View, ViewBatch, ViewSpec


@register("ssal")
class SSAL(nn.Module):
    """In the style of self-supervised alignment learning (Li, Ouyang, Wan, arXiv 2406.15699).

    The alignment losses are as a review gives them; the global positional loss could not be read, and PCL's stands in.

    Idea: near slices show similar structures, so each feature of one should have a close match among the features of
    the other; a loss on whole slices orders them along the body and keeps the first from collapsing.

    Formula: with A = X_i^T X_j the cosines of the two maps, L_LA = mean over p of |1 - max over q of A_pq|, p and q in
    the same window of side `window` (0: anywhere), averaged over both directions; L = L_LA + `w_position` L_PCL, the
    loss of `pcl`.

    Traps: constant features make L_LA zero, so it is refused without the positional term; both slices must get the same
    flips and scale or windows show different places; air matches air, so padding neither counts nor is matched to; in
    3-D, pairs are two separately encoded sub-volumes, as planes of one map share what they see.

    Cost: one encoder pass a view, no decoder; M w^3 cosines a pair of maps with M positions, M^2 without windows.

    Use it on scans with thin slices; 2-D as in the paper with crops of one slice and a 2-D backbone, or sub-volumes.
    """

    class Config(MethodConfig):
        """Settings of the SSAL-style method."""

        TINY = tiny_settings(hidden=16, out=8, window=2)

        crops: Crops = Field(
            default=Crops(flip=(0.0, 0.5, 0.5)), description="Views; the same transform for both, our choice"
        )
        gap: tuple[int, int] = Field(default=(1, 3), description="Nearest and furthest pair, slices; our choice")
        gap_mm: float | None = Field(
            default=None,
            gt=0,
            description="Pairs further apart than this do not align; our choice, 5 for mixed spacing",
        )
        feature_level: int | None = Field(
            default=None,
            ge=0,
            description="Encoder level aligned; unset: deepest with 6 positions in-plane, our choice",
        )
        window: int = Field(default=4, ge=0, description="Side of the windows, features; 0 for none; our choice")
        align_out: int = Field(default=128, ge=1, description="Width of the aligned features; our choice")
        w_position: float = Field(default=1.0, gt=0, description="Weight of the positional loss; our choice")
        threshold: float = Field(default=0.1, gt=0, description="Positional loss: largest difference; PCL's code")
        temperature: Temperature = Field(default=0.1, description="Positional loss: t; PCL's code")
        denominator: Denominator = Field(default="all", description="Positional loss: below the line; PCL's code")
        hidden: int = Field(default=256, ge=1, description="Hidden width of the positional head; our choice")
        out: int = Field(default=128, ge=1, description="Width of the positional embedding; our choice")
        norm: Norm = Field(default="none", description="Norm in the positional head; our choice")

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.level = level_for(backbone, config.crops.size_DHW, config.feature_level)
        train_only(backbone, backbone.level_keys(len(backbone.levels) - 1) + backbone.level_keys(self.level))
        self.embed = head([backbone.levels[self.level].channels, config.align_out], dense=True, norm="none")
        self.projector = head([backbone.levels[-1].channels, config.hidden, config.out], norm=config.norm)

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """Two boxes of each sample, shifted along D, role `slice`."""
        return ViewSpec((config.crops.role("slice", 2, offset_vox=config.gap, share_spatial=True),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Terms `align` and `position`; monitors the spread of the aligned features and positives of an anchor."""
        config, pair = self.config, views.roles["slice"]
        maps = [encode(self.backbone, view, ctx) for view in pair]
        dense = [self.embed(m[self.level]) for m in maps]
        size = [int(n) for n in dense[0].shape[2:]]
        window = config.window or max(size)
        visible = [_visible(view, size) for view in pair]
        forth, back = (windowed_alignment(dense[i], dense[1 - i], window, visible[i], visible[1 - i]) for i in range(2))
        near_B = self._near(pair, views).to(forth.dtype)
        align = ((forth + back) / 2 * near_B).mean()
        pooled = [self.projector(m[-1].mean((2, 3, 4))) for m in maps]
        position, positives = position_contrast(
            pooled, pair, views, ctx, config.threshold, config.temperature, config.denominator
        )
        return LossTerms(
            {"align": align, "position": config.w_position * position},
            {"feature_std": spread(dense[0]), "positives": positives},
        )

    def _near(self, pair: tuple[View, ...], views: ViewBatch) -> Tensor:
        gap_mm = (pair[0].position_B3 - pair[1].position_B3)[:, 0].abs() * views.shape_B3[:, 0] * views.spacing_B3[:, 0]
        # A hair of slack: a gap of exactly the limit counts, whatever rounding says.
        return (
            torch.ones_like(gap_mm, dtype=torch.bool)
            if self.config.gap_mm is None
            else gap_mm <= (self.config.gap_mm + 1e-6)
        )


def _visible(view: View, size: list[int]) -> Tensor:
    """Positions of a map whose cell shows at least some of the volume, (B, d, h, w)."""
    return nn.functional.adaptive_max_pool3d(view.valid_B1DHW, size)[:, 0] > 0
