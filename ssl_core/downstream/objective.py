"""Fine-tuning as an objective of the engine: a network, its loss on labelled crops, and what is trained when."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ssl_core.distributed import Collectives
from ssl_core.downstream.deep_supervision import AuxiliaryOutputs, coarser, weights
from ssl_core.downstream.settings import FinetuneConfig
from ssl_core.methods.base import LossTerms, StepContext
from ssl_core.networks.backbone import Backbone
from ssl_core.networks.ema import follow, target_of
from ssl_core.train.optim import Rates
from ssl_core.views.types import ViewBatch

_SMOOTH = 1e-5
"""Added to both parts of a ratio, as MONAI does: a class that nobody sees has no loss."""


class Segmentation(nn.Module):
    """Segmentation of labelled crops. An objective for `ssl_core.train.engine.Engine`.

    Formula: L = region + voxel. The region loss is 1 - T, the mean over the classes without background, with
    T = TP / (TP + a FP + b FN) of soft counts over all crops of a part of the batch, on all ranks (Tversky: Salehi et
    al. 2017; a = b = 1/2 is Dice). The voxel loss is cross entropy or focal loss (Lin et al. 2017), MONAI's. With deep
    supervision L is the weighted sum of the losses of the output and of lower decoder levels (nnU-Net's weights), each
    on labels of its own resolution.

    Args:
        network: From `ssl_core.downstream.transfer.build_segmenter`; trained in place.
        config: Settings.
        label: Name of the label map in the views.
        labels: Label value to name, in the order of the classes 1, 2, ...
        pretrained: Whether the rates and the order of `config.trained` and `encoder_lr_scale` apply.
        seed: Of the random weights of auxiliary outputs.

    Attributes:
        average: Moving average of the weights, where there is one.
        rates: For the engine's optimizer; None where all parameters have one rate.
        losses: Loss of each part since `losses` was last cleared.

    Raises:
        ConfigError: the network has fewer decoder levels than are to be supervised.
    """

    def __init__(
        self,
        network: Backbone,
        config: FinetuneConfig,
        *,
        label: str,
        labels: Mapping[int, str],
        pretrained: bool,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone, self.config, self.label, self.labels = network, config, label, labels
        self.average = target_of(network) if config.ema else None
        deep = config.deep_supervision
        self.auxiliary = AuxiliaryOutputs(network, deep, seed) if deep else None
        self.rates: Rates | None = None
        self.losses: list[Tensor] = []
        region, _, voxel = config.loss.partition("_")
        self._miss = config.tversky_beta if region == "tversky" else 0.5
        self._region = region
        self._focal: nn.Module | None = None
        if voxel == "focal":
            from monai.losses.focal_loss import FocalLoss  # seconds to import

            self._focal = FocalLoss(gamma=config.focal_gamma, to_onehot_y=True, use_softmax=True)
        for parameter in self._net.parameters():
            parameter.requires_grad_(True)
        if pretrained:
            self._set_rates()

    @property
    def _net(self) -> nn.Module:
        return self.backbone.net

    @property
    def measured(self) -> Backbone:
        """The network that is measured and stored."""
        return self.backbone if self.average is None else self.average

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Terms `dice` or `tversky`, and `ce` or `focal`."""
        self._join(ctx.step)
        (view,) = views.roles["patch"]
        classes_BDHW = classes_of(view.maps[self.label], self.labels)
        if self.auxiliary is None:
            terms = self._terms(self.backbone.logits(view.image_BCDHW), classes_BDHW, ctx.collectives)
        else:
            outputs = self.auxiliary(self.backbone, view.image_BCDHW)
            truths = [classes_BDHW, *(coarser(classes_BDHW, stride) for stride in self.auxiliary.strides)]
            shares = weights(len(outputs))
            levels = [self._terms(*pair, ctx.collectives) for pair in zip(outputs, truths, strict=True)]
            terms = {
                name: torch.stack([share * level[name] for share, level in zip(shares, levels, strict=True)]).sum()
                for name in levels[0]
            }
        loss = LossTerms(terms)
        self.losses.append(loss.total.detach())
        return loss

    def _terms(self, logits_BKDHW: Tensor, classes_BDHW: Tensor, collectives: Collectives) -> dict[str, Tensor]:
        """The loss of regions and that of voxels at one resolution."""
        # A sum of 16-bit shares loses voxels.
        exact = logits_BKDHW.float() if logits_BKDHW.dtype.itemsize < 4 else logits_BKDHW
        region = region_loss(exact, classes_BDHW, miss=self._miss, collectives=collectives)
        if self._focal is None:
            return {self._region: region, "ce": nn.functional.cross_entropy(exact, classes_BDHW)}
        return {self._region: region, "focal": self._focal(exact, classes_BDHW[:, None])}

    def after_step(self, ctx: StepContext) -> None:
        """Move the average."""
        if self.average is None:
            return
        share = min(self.config.ema, (1 + ctx.step) / (10 + ctx.step))
        follow(self.average, self.backbone, share)
        pairs = zip(cast(nn.Module, self.average).buffers(), cast(nn.Module, self.backbone).buffers(), strict=True)
        with torch.no_grad():
            for own, other in pairs:
                own.copy_(other)

    def encoder(self) -> Backbone:
        """The network that is measured and stored."""
        return self.measured

    def _set_rates(self) -> None:
        """Groups of parameters by encoder level, their scales, and the step at which each joins."""
        outputs = [] if self.auxiliary is None else [name for name, _ in self.auxiliary.named_parameters()]
        self._group_of = level_groups(self.backbone, self.config)
        self.rates = rates_of(
            self.backbone,
            self.config,
            {f"backbone.net.{key}": group for key, group in self._group_of.items()}
            | {f"auxiliary.{name}": "rest" for name in outputs},
        )

    def _join(self, step: int) -> None:
        """Let gradients reach what is trained at a step, and nothing else: neither clipping nor time is spent on it."""
        if self.rates is None or not self.config.trained.steps:
            return
        scales = self.rates.at(step)
        for key, parameter in self._net.named_parameters():
            parameter.requires_grad_(scales[self._group_of[key]] > 0)


def level_groups(backbone: Backbone, config: FinetuneConfig) -> dict[str, str]:
    """The group of each parameter of a network, by its name there: its encoder level, or the rest.

    Gradients are asked for where `config.trained` has any, in an encoder that is never trained not.
    """
    levels = len(backbone.levels)
    level_of = {key: levels - 1 for key in backbone.encoder_keys()}
    for level in reversed(range(levels)):
        level_of |= dict.fromkeys(backbone.level_keys(level), level)
    frozen = config.trained.parts == "frozen_encoder" or config.encoder_lr_scale == 0
    group_of = {}
    for key, parameter in backbone.net.named_parameters():
        group_of[key] = f"level-{level_of[key]}" if key in level_of else "rest"
        parameter.requires_grad_(not (frozen and key in level_of))
    return group_of


def rates_of(backbone: Backbone, config: FinetuneConfig, group_of: Mapping[str, str]) -> Rates | None:
    """Scales of the groups' rates, and the step at which each joins; None where all have one rate throughout.

    Args:
        backbone: The network.
        config: Settings.
        group_of: Group of each parameter of the objective, see `level_groups`.
    """
    parts, levels = config.trained, len(backbone.levels)
    scales, joins = {"rest": 1.0}, {"rest": 0}
    for level in range(levels):
        depth = levels - 1 - level
        scales[f"level-{level}"] = config.encoder_lr_scale * parts.layer_decay**depth
        joins[f"level-{level}"] = parts.steps * (1 + depth if parts.parts == "gradual" else 1)
    if set(scales.values()) == {1.0} and not parts.steps:
        return None
    return Rates(
        group_of, lambda step: {group: scale if step >= joins[group] else 0.0 for group, scale in scales.items()}
    )


def region_loss(logits_BKDHW: Tensor, classes_BDHW: Tensor, *, miss: float, collectives: Collectives) -> Tensor:
    """1 - Tversky index of soft counts over the batch of all ranks, the mean over the classes without background.

    With `miss` 0.5 it is MONAI's `DiceLoss(include_background=False, softmax=True, batch=True)`.

    Args:
        logits_BKDHW: K classes, background first.
        classes_BDHW: Class numbers, int64.
        miss: Weight of missed voxels; 1 less it of false ones.
        collectives: The ranks.
    """
    share = torch.softmax(logits_BKDHW, 1)[:, 1:]
    numbers = torch.arange(1, logits_BKDHW.shape[1], device=share.device).view(1, -1, 1, 1, 1)
    truth = (classes_BDHW[:, None] == numbers).to(share.dtype)
    axes = (0, 2, 3, 4)
    counts = torch.stack([(share * truth).sum(axes), share.sum(axes), truth.sum(axes)])
    hit, predicted, actual = collectives.sum(counts).unbind()
    below = hit + (1 - miss) * (predicted - hit) + miss * (actual - hit)
    return (1 - (2 * hit + _SMOOTH) / (2 * below + _SMOOTH)).mean()


def classes_of(map_BDHW: Tensor, labels: Mapping[int, str]) -> Tensor:
    """Label values to class numbers 0, 1, 2, ...; values that are not in `labels` are background."""
    classes = torch.zeros_like(map_BDHW)
    for number, value in enumerate(labels, 1):
        classes = classes.masked_fill(map_BDHW == value, number)
    return classes
