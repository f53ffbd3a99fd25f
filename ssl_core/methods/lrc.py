"""LRC-style: pixels of one super-pixel attract, the image's other super-pixels repel, beside another method."""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssl_core.config import parse
from ssl_core.losses.cosine import unit
from ssl_core.losses.regions import pixel_contrast, prototype_contrast, region_means
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    Temperature,
    decode,
    method_class,
    register,
    spread,
    tiny_settings,
    train_only,
    with_memo,
)
from ssl_core.methods.parts.region_pixels import map_at, region_pixels
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.heads import Norm, head, head_at
from ssl_core.superpixels.settings import Superpixels
from ssl_core.views.types import View, ViewBatch, ViewSpec


@register("lrc")
class LRC(nn.Module):
    """In the style of localized region contrast (Yan et al., arXiv 2304.03406), whose loss and settings are unread.

    Idea: Felzenszwalb's super-pixels are free pseudo-regions. Beside a global method, or supervised pre-training, on
    the same views, the decoder's features of sampled pixels are contrasted by region.

    Formula: L = L_base + `w_local` L_local. Form A, over R regions of K pixels of one image: mean over pixels n of
    -1/|P(n)| sum over p in P(n) of log( exp(z_n . z_p / t) / sum over a != n of exp(z_n . z_a / t) ), P(n) the other
    pixels of n's region. Form B, with v_r and w_r the mean embeddings of region r in view 1 and view 2: mean over
    regions r of -log( exp(v_r . w_r / t) / sum over regions s of exp(v_r . w_s / t) ), averaged with the views swapped.
    Vectors have unit length; an image with fewer than two regions counts as 0.

    Traps: form A cannot fall below about log(K - 1), so judge it against that floor; region 0 means padding; regions
    with fewer than K pixels at the feature's resolution are dropped, so low-resolution features lose small regions;
    neighbouring super-pixels of one organ are pushed apart, which `w_local` and the super-pixels' scale control; their
    lengths are in voxels, so that volumes of unlike spacing should be ingested with one `spacing_mm`.

    Cost: that of the base method, a decoder pass a view (shared with a base that decodes), and B (R K)^2 cosines. Form
    A runs its head at the drawn pixels only; form B runs it everywhere and is several times slower. The super-pixels
    once a volume, 0.5 s for a slice of 512 x 512 on one core, in 3-D 6 s for a million voxels; in the store a third of
    the image's bytes, in 3-D half of them (hippocampus MR).

    Use it as an addition to `base`, to be compared with the base alone at equal steps. The super-pixels are read from
    the store, where `tomoscale data superpixels URL` puts them beside the images; a job that finds a volume without
    them makes them first. Views carry them with nearest sampling.
    """

    class Config(MethodConfig):
        """Settings of the LRC-style method."""

        TINY = tiny_settings(hidden=16, out=8, regions=4, pixels=4, base_settings={"hidden": 16, "out": 8, "queue": 8})

        crops: Crops = Field(default=Crops(min_overlap=0.3), description="Views; our choice")
        base: Literal["mocov2", "byol", "simclr", "supervised"] = Field(
            default="mocov2",
            description="What it is added to; MoCo in the paper's overview, supervised pre-training in its abstract",
        )
        base_settings: dict[str, Any] = Field(
            default={}, description="Settings of `base`; it gets these crops; our choice: its defaults"
        )
        superpixels: Superpixels = Field(
            default=Superpixels(), description="How the super-pixels are made, which names their map in the store"
        )
        w_local: float = Field(default=1.0, gt=0, description="Weight of the region loss; our choice")
        form: Literal["A", "B"] = Field(default="A", description="Pixels, or means of regions; our choice")
        regions: int = Field(default=16, ge=2, description="Regions drawn from a view, R; our choice")
        pixels: int = Field(default=16, ge=2, description="Pixels drawn from a region, K; our choice")
        temperature: Temperature = Field(default=0.1, description="t; our choice, as DetCon's")
        hidden: int = Field(default=128, ge=1, description="Hidden width of the dense head; our choice")
        out: int = Field(default=128, ge=1, description="Embedding width of the dense head; our choice")
        norm: Norm = Field(default="batch", description="Norm in the dense head; our choice")

        @model_validator(mode="after")
        def _base_fits(self) -> "LRC.Config":
            if "crops" in self.base_settings:
                raise ValueError("base_settings without `crops`: the base gets those of lrc")
            base = method_class(self.base).view_spec(_base_config(self))
            if self.form == "B" and base.roles[0].count < 2:
                raise ValueError(f"two views of a sample for form B: set `views` in base_settings of {self.base}")
            return self

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.base = method_class(config.base)(_base_config(config), backbone)
        train_only(backbone, backbone.encoder_keys() + backbone.decoder_keys())
        self.level = backbone.decoder_levels[-1]
        self.dense = head([self.level.channels, config.hidden, config.out], dense=True, norm=config.norm)

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """The base method's views, with super-pixels."""
        base: ViewSpec = method_class(config.base).view_spec(_base_config(config))
        return ViewSpec(base.roles, (*base.maps, config.superpixels.name), (config.superpixels,))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """The base's terms and `region`; monitors also the regions drawn from a view and the embeddings' spread."""
        ctx = with_memo(ctx)
        terms = self.base(views, ctx)
        pair = views.roles["global"]
        maps = [decode(self.backbone, view, ctx)[-1] for view in pair]
        form = self._pixels if self.config.form == "A" else self._means
        local, drawn, dense_std = form(pair, maps, views, ctx)
        return LossTerms(
            {**terms.terms, "region": self.config.w_local * local},
            {**terms.monitors, "regions": drawn, "dense_std": dense_std},
        )

    def after_step(self, ctx: StepContext) -> None:
        """What the base does."""
        self.base.after_step(ctx)

    def _draw(self, view: View, feature: Tensor, views: ViewBatch, ctx: StepContext, v: int) -> tuple[Tensor, ...]:
        ids = self._ids(view, feature)
        pixels = self.config.pixels
        drawn = region_pixels(ids, ids > 0, self.config.regions, pixels, seed=ctx.seed + v, sample_B=views.sample_B)
        return ids, *drawn

    def _ids(self, view: View, feature: Tensor) -> Tensor:
        d, h, w = feature.shape[2:]
        return map_at(self.level, view.maps[self.config.superpixels.name], (int(d), int(h), int(w))).flatten(1)

    def _pixels(
        self, pair: tuple[View, ...], maps: list[Tensor], views: ViewBatch, ctx: StepContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, counts, spreads = [], [], []
        for v, (view, feature) in enumerate(zip(pair, maps, strict=True)):
            _, index_BRK, region_BR, valid_BR = self._draw(view, feature, views, ctx, v)
            # The head's hidden map at full resolution would cost several times the decoder.
            picked_BNE = head_at(self.dense, feature, index_BRK.flatten(1))
            each = self.config.pixels
            losses.append(
                pixel_contrast(
                    picked_BNE,
                    region_BR.repeat_interleave(each, 1),
                    valid_BR.repeat_interleave(each, 1),
                    self.config.temperature,
                )
            )
            counts.append(valid_BR.sum(1).double().mean())
            spreads.append(spread(picked_BNE.transpose(1, 2)))
        return torch.stack(losses).mean(), torch.stack(counts).mean(), spreads[0]

    def _means(
        self, pair: tuple[View, ...], maps: list[Tensor], views: ViewBatch, ctx: StepContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        dense = [self.dense(feature) for feature in maps]
        ids, _, region_BR, valid_BR = self._draw(pair[0], dense[0], views, ctx, 0)
        other_ids = self._ids(pair[1], dense[1])
        v, seen_v = region_means(unit(dense[0], 1).flatten(2), ids, region_BR)
        u, seen_u = region_means(unit(dense[1], 1).flatten(2), other_ids, region_BR)
        valid = valid_BR & seen_v & seen_u
        loss = prototype_contrast(v, u, valid, self.config.temperature)
        return loss, valid.sum(1).double().mean(), spread(dense[0])


def _base_config(config: LRC.Config) -> Any:
    settings = {**config.base_settings, "crops": config.crops.model_dump()}
    return parse(method_class(config.base).Config, settings, f"base_settings of {config.base}")
