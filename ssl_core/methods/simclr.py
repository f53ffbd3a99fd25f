"""SimCLR: two crops of a scan attract, crops of other scans repel."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_core.losses.cosine import product
from ssl_core.losses.info_nce import nt_xent
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    MethodConfig,
    StepContext,
    Temperature,
    encode,
    register,
    tiny_settings,
    train_only,
)
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.heads import Norm, head
from ssl_core.views.types import ViewBatch, ViewSpec


@register("simclr")
class SimCLR(nn.Module):
    """SimCLR (Chen et al., arXiv 2002.05709) on volumes; a control that knows nothing of place.

    Idea: an image-level embedding should not change under augmentation and should differ between images.

    Formula: with unit embeddings z of the 2B views, L = mean over i of
    -log( exp(z_i . z_p(i) / t) / sum over a != i of exp(z_i . z_a / t) ). Anchors are a rank's own views, keys the
    views of all ranks.

    Traps: the same organ in another scan is a negative here; crops of one scan in the same batch are negatives of each
    other; small batches give few negatives.

    Cost: two encoder passes, no decoder, no copy of the weights; one row of 2B x E embeddings is gathered.

    Use it as the global control beside the local methods.
    """

    class Config(MethodConfig):
        """Settings of SimCLR."""

        TINY = tiny_settings(hidden=16, out=8)

        crops: Crops = Field(
            default=Crops(min_overlap=0.3), description="Views; overlap our choice (nnssl: half along each axis)"
        )
        temperature: Temperature = Field(default=0.5, description="t; nnssl's SimCLR trainer")
        pool: Literal["all", "last"] = Field(
            default="all",
            description="Average-pooled maps of all encoder levels, concatenated (nnssl), or of the deepest",
        )
        hidden: int = Field(
            default=512, ge=1, description="Width of the head's hidden layers; our choice (nnssl: 2048)"
        )
        out: int = Field(default=128, ge=1, description="Embedding width; SimCLR's 128")
        layers: int = Field(default=3, ge=1, description="Layers of the head; nnssl's 3")
        norm: Norm = Field(default="batch", description="Norm in the head, over the global batch; SimCLR")

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        every = config.pool == "all"  # skips may have layers that the deepest level does not see
        train_only(backbone, backbone.encoder_keys() if every else backbone.level_keys(len(backbone.levels) - 1))
        pooled = backbone.levels if every else backbone.levels[-1:]
        widths = [sum(level.channels for level in pooled), *[config.hidden] * (config.layers - 1), config.out]
        self.projector = head(widths, norm=config.norm)

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """Two crops of each sample, role `global`."""
        return ViewSpec((config.crops.role("global", 2),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Term `contrast`; monitors the mean cosine of positives and negatives."""
        local = [self._embed(encode(self.backbone, view, ctx)) for view in views.roles["global"][:2]]
        world, rank, b = ctx.collectives.world, ctx.collectives.rank, len(views)
        keys = torch.cat([ctx.collectives.gather(z) for z in local])
        own = rank * b + torch.arange(b, device=keys.device)
        itself = torch.cat([own, own + world * b])
        positive = torch.cat([own + world * b, own])
        loss = nt_xent(torch.cat(local), keys, positive, itself, self.config.temperature)
        return LossTerms({"contrast": loss}, _similarities(local))

    def _embed(self, maps: list[Tensor]) -> Tensor:
        pooled = maps if self.config.pool == "all" else maps[-1:]
        embedded: Tensor = self.projector(torch.cat([m.mean((2, 3, 4)) for m in pooled], dim=1))
        return embedded


@torch.no_grad()
def _similarities(local: list[Tensor]) -> dict[str, Tensor]:
    a, b = (nn.functional.normalize(z.detach().float(), dim=1) for z in local)
    cosine = product(a, b.t())
    positive = cosine.diagonal().mean()
    others = cosine.numel() - len(cosine)
    return {"positive_cosine": positive, "negative_cosine": (cosine.sum() - cosine.diagonal().sum()) / max(others, 1)}
