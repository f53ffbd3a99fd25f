"""MoCo v2: contrast against a queue of embeddings that a slowly following network made of earlier crops."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ssl_core.losses.cosine import product, unit
from ssl_core.losses.info_nce import queue_nce
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
from ssl_core.networks.ema import follow, target_of
from ssl_core.networks.heads import Norm, head
from ssl_core.views.types import ViewBatch, ViewSpec


@register("mocov2")
class MoCoV2(nn.Module):
    """MoCo v2 (He et al., arXiv 1911.05722; Chen et al., arXiv 2003.04297) on volumes; contrast for small batches.

    Idea: negatives come from a queue, so their number does not depend on the batch.

    Formula: L = mean of -log( exp(q . k / t) / (exp(q . k / t) + sum over the queue of exp(q . n / t)) ) with q the
    online embedding of view 1 and k the following network's embedding of view 2; then all ranks' k enter the queue, and
    the following network's weights move as xi <- m xi + (1 - m) theta, m = `momentum`, but at most (1 + i) / (10 + i)
    at step i.

    Traps: pooled maps of a network with instance norm are nearly the same for every scan, and a head without norm keeps
    them so: queries then tell their key from the queue by its age alone, while weights still change fast, and end as
    one constant; so the loss of a run cannot be compared over its steps (watch `positive_cosine` and `accuracy`, or use
    `tomoscale bench learn`, which fills the queue anew); crops of a volume that is still in the queue would be
    negatives of themselves, which small data sets make common, so they are left out by default; a queue much longer
    than the data set holds little but repeats.

    Cost: one online and one target encoder pass a step; a second copy of the weights; a queue of `queue` x `out`.

    Use it as the global part of LRC, and as the contrastive control when batches are small.
    """

    class Config(MethodConfig):
        """Settings of MoCo v2."""

        TINY = tiny_settings(hidden=16, out=8, queue=8)

        crops: Crops = Field(
            default=Crops(min_overlap=0.3),
            description="Views; overlap and intensity our choice: with `strong` it learned less in short runs",
        )
        temperature: Temperature = Field(default=0.2, description="t; MoCo v2's 0.2")
        pool: Literal["all", "last"] = Field(
            default="all",
            description="Average-pooled maps of all encoder levels, concatenated (nnssl's SimCLR), or of the deepest "
            "(MoCo); our choice, measured on hippocampus",
        )
        hidden: int = Field(default=512, ge=1, description="Hidden width of the head; our choice (MoCo v2: 2048)")
        out: int = Field(default=128, ge=1, description="Embedding width; MoCo's 128")
        norm: Norm = Field(
            default="batch",
            description="Norm in the head; as MoCo v3 (MoCo v2 has none there, but batch norm in the network)",
        )
        last_norm: bool = Field(
            default=False, description="Whether the embeddings are normed too, as MoCo v3; no help to batches of a few"
        )
        queue: int = Field(default=1024, ge=1, description="Length of the queue; our choice (MoCo: 65536)")
        momentum: float = Field(
            default=0.99, ge=0, le=1, description="Momentum of the target, m; our choice for short runs (MoCo: 0.999)"
        )
        same_volume_negatives: bool = Field(
            default=False, description="Keep queue entries of the query's own volume as negatives; our choice"
        )

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        every = config.pool == "all"  # skips may have layers that the deepest level does not see
        train_only(backbone, backbone.encoder_keys() if every else backbone.level_keys(len(backbone.levels) - 1))
        pooled = backbone.levels if every else backbone.levels[-1:]
        widths = [sum(level.channels for level in pooled), config.hidden, config.out]
        self.projector = head(widths, norm=config.norm, last_norm=config.last_norm)
        self.target_backbone, self.target_projector = target_of(backbone), target_of(self.projector)
        self.register_buffer("queue_KE", unit(torch.randn(config.queue, config.out), 1))
        self.register_buffer("queue_volume_K", torch.full((config.queue,), -1, dtype=torch.int64))
        self.register_buffer("queue_next", torch.zeros((), dtype=torch.int64))
        self.queue_KE: Tensor
        self.queue_volume_K: Tensor
        self.queue_next: Tensor
        self._fresh: list[tuple[Tensor, Tensor, Tensor]] = []

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        """Two crops of each sample, role `global`."""
        return ViewSpec((config.crops.role("global", 2),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Term `contrast`; monitors the positives' cosine, the share of queries that are nearer to their positive than
        to any negative, and the spread of the deepest features.
        """
        first, second = views.roles["global"][:2]  # a composition may show more
        maps = encode(self.backbone, first, ctx)
        query = self.projector(self._pooled(maps))
        with torch.no_grad():
            key = unit(self.target_projector(self._pooled(encode(self.target_backbone, second, ctx))), 1)
        keep = None
        if not self.config.same_volume_negatives:
            keep = self.queue_volume_K[None] != views.volume_B[:, None]
        loss = queue_nce(query, key, self.queue_KE.clone(), self.config.temperature, keep)
        self._fresh.append((key, views.volume_B, views.sample_B))
        monitors = _told_apart(unit(query.detach(), 1), key, self.queue_KE, keep)
        return LossTerms({"contrast": loss}, {**monitors, "feature_std": spread(maps[-1])})

    @torch.no_grad()
    def after_step(self, ctx: StepContext) -> None:
        """Puts this step's keys of all ranks into the queue, oldest out first, and moves the target."""
        key, volume, sample = (ctx.collectives.gather(torch.cat(parts)) for parts in zip(*self._fresh, strict=True))
        self._fresh.clear()
        # In the order of samples, so that which of them fall out does not depend on how ranks share them.
        newest = sample.argsort(stable=True)[-self.config.queue :]
        key, volume = key[newest], volume[newest]
        place = (self.queue_next + torch.arange(len(key), device=key.device)) % self.config.queue
        self.queue_KE[place] = key.to(self.queue_KE.dtype)
        self.queue_volume_K[place] = volume
        self.queue_next.copy_((self.queue_next + len(key)) % self.config.queue)
        # A young target follows faster, as in `short_run_momentum`.
        momentum = min(self.config.momentum, (1 + ctx.step) / (10 + ctx.step))
        follow(self.target_backbone, self.backbone, momentum)
        follow(self.target_projector, self.projector, momentum)

    def _pooled(self, maps: list[Tensor]) -> Tensor:
        pooled = maps if self.config.pool == "all" else maps[-1:]
        return torch.cat([m.mean((2, 3, 4)) for m in pooled], dim=1)


@torch.no_grad()
def _told_apart(query_BE: Tensor, key_BE: Tensor, queue_KE: Tensor, keep_BK: Tensor | None) -> dict[str, Tensor]:
    positive_B = (query_BE * key_BE).sum(1)
    negative_BK = product(query_BE, queue_KE.to(query_BE.dtype).t())
    if keep_BK is not None:
        negative_BK = negative_BK.masked_fill(~keep_BK, float("-inf"))
    first_B = (positive_B[:, None] > negative_BK).all(1)
    return {"positive_cosine": positive_B.mean(), "accuracy": first_B.to(positive_B.dtype).mean()}
