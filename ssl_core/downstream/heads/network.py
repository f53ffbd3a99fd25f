"""An encoder with a linear head, its objective for the engine, and the batches of a linear probe."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_core.distributed import Collectives
from ssl_core.downstream.heads.targets import Target
from ssl_core.downstream.objective import level_groups, rates_of
from ssl_core.downstream.settings import FinetuneConfig
from ssl_core.downstream.transfer import Start, build_segmenter
from ssl_core.methods.base import LossTerms, StepContext
from ssl_core.networks.backbone import Backbone
from ssl_core.portable.head.pooling import pooled
from ssl_core.portable.head.settings import Head
from ssl_core.train.optim import Rates
from ssl_core.views.types import View, ViewBatch
from storage.errors import ConfigError


class HeadNetwork(nn.Module):
    """A backbone and a linear layer on the pooled maps of its deepest encoder levels.

    Args:
        backbone: Its decoder is not used.
        levels: Deepest levels that are pooled.
        outputs: Of the linear layer.
    """

    def __init__(self, backbone: Backbone, levels: int, outputs: int) -> None:
        super().__init__()
        self.backbone, self.levels = backbone, levels
        self.linear = nn.Linear(sum(level.channels for level in backbone.levels[-levels:]), outputs)

    def features(self, x_BCDHW: Tensor) -> Tensor:
        """Pooled features of crops or windows, (B, E)."""
        return pooled(self.backbone.features(x_BCDHW)[-self.levels :])

    def head(self, target: Target) -> Head:
        """What a bundle keeps of the linear layer: float32 on the CPU."""
        weight_KE, bias_K = (tensor.detach().float().cpu().clone() for tensor in (self.linear.weight, self.linear.bias))
        return Head(target.column, self.levels, target.classes, target.mean, target.sd, weight_KE, bias_K)


def build_head(
    name: str, arguments: Mapping[str, Any], levels: int, outputs: int, seed: int, start: Start | None
) -> HeadNetwork:
    """An encoder with what `start` brings and a linear layer with random weights from `seed`.

    Args:
        name: Backbone name.
        arguments: Its keyword arguments.
        levels: See `HeadNetwork`, like the next.
        outputs: Of the linear layer.
        seed: Seed of the random weights.
        start: Pre-trained weights.

    Raises:
        WeightsError: some tensor has another name or shape.
    """
    backbone = build_segmenter(name, arguments, int(arguments.get("out_channels", 2)), seed, start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HeadNetwork(backbone, levels, outputs)


def require_modules(name: str, modules: Sequence[str], levels: int) -> None:
    """Refuse to pool levels that an encoder does not have, or that no module of its stock network puts out.

    Args:
        name: What messages call the encoder.
        modules: Of each level, finest first; empty where there is none, of which a bundle could compute nothing.
        levels: Deepest levels to pool.

    Raises:
        ConfigError: names the setting and how many there are.
    """
    usable = next((count for count, module in enumerate(reversed(modules)) if not module), len(modules))
    if levels > usable:
        raise ConfigError(
            "finetune.head.levels",
            expected=f"at most {usable}, which {name} has",
            found=str(levels),
            remedy="lower it",
        )


class WholeVolume(nn.Module):
    """A class or a number of each crop's volume. An objective for `ssl_core.train.engine.Engine`.

    Formula: the mean over crops of w_c CE, with w_c = 1 or n / (K' n_c) of the K' classes among n training volumes
    ("balanced"); or of smooth L1 (Girshick 2015, threshold 1) or the square of the difference to (y - mean) / sd.

    Args:
        network: Trained in place; of a linear probe its linear layer alone, on views that hold features.
        config: Settings.
        target: What is learned.
        train: Manifest indices of the training volumes.
        pretrained: Whether `config.trained` and `encoder_lr_scale` apply.

    Attributes:
        rates: For the engine's optimizer; None where all parameters have one rate.
        losses: Loss of each part since `losses` was last cleared.
        stored: The module that is measured and stored.
    """

    def __init__(
        self, network: HeadNetwork, config: FinetuneConfig, target: Target, train: Sequence[int], pretrained: bool
    ) -> None:
        super().__init__()
        self.config, self.target = config, target
        self.stored: nn.Module = network.linear if config.head.frozen else network
        self.rates: Rates | None = None
        self.losses: list[Tensor] = []
        self._network = (network,)  # in a tuple, of which torch registers nothing: a probe's encoder is not trained
        self._group_of: dict[str, str] = {}
        every = sorted(target.value_of)
        truth_N = torch.tensor([target.value_of[i] for i in every], dtype=torch.float64)
        self.register_buffer("_index_N", torch.tensor(every), persistent=False)
        self.register_buffer("_truth_N", (truth_N - target.mean) / target.sd, persistent=False)
        self.register_buffer("_weight_K", class_weights(target, train, config.head.class_weights), persistent=False)
        if not config.head.frozen:
            self._set_rates(network.backbone, pretrained)

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        """Term `ce`, `smooth_l1` or `mse`."""
        (view,) = views.roles["patch"]
        (network,) = self._network
        if self.config.head.frozen:
            features_BE = view.image_BCDHW.flatten(1)
        else:
            self._join(network.backbone, ctx.step)
            features_BE = network.features(view.image_BCDHW)
        outputs_BK = network.linear(features_BE)
        exact = outputs_BK.float() if outputs_BK.dtype.itemsize < 4 else outputs_BK
        truth_B = self.get_buffer("_truth_N")[torch.searchsorted(self.get_buffer("_index_N"), views.volume_B)]
        loss = LossTerms(head_loss(exact, truth_B, self.target, self.config.head.loss, self.get_buffer("_weight_K")))
        self.losses.append(loss.total.detach())
        return loss

    def after_step(self, ctx: StepContext) -> None:
        """Nothing follows a step."""

    def encoder(self) -> Backbone:
        """The network whose encoder is measured and stored."""
        return self._network[0].backbone

    def _set_rates(self, backbone: Backbone, pretrained: bool) -> None:
        encoder = set(backbone.encoder_keys())
        if pretrained:
            groups = level_groups(backbone, self.config)
            self._group_of = {key: groups[key] for key in groups if key in encoder}
            group_of = {f"stored.backbone.net.{key}": group for key, group in self._group_of.items()}
            group_of |= {"stored.linear.weight": "rest", "stored.linear.bias": "rest"}
            self.rates = rates_of(backbone, self.config, group_of)
        for key, parameter in backbone.net.named_parameters():  # a decoder that nothing uses would only decay
            parameter.requires_grad_(key in encoder and (not pretrained or parameter.requires_grad))

    def _join(self, backbone: Backbone, step: int) -> None:
        """Let gradients reach what is trained at a step; see `Segmentation`."""
        if self.rates is None or not self.config.trained.steps:
            return
        scales = self.rates.at(step)
        for key, parameter in backbone.net.named_parameters():
            if key in self._group_of:
                parameter.requires_grad_(scales[self._group_of[key]] > 0)


def head_loss(outputs_BK: Tensor, truth_B: Tensor, target: Target, name: str, weight_K: Tensor) -> dict[str, Tensor]:
    """The loss of a part of a batch; see `WholeVolume`.

    Weighted cross entropy is divided by the number of crops, not by the sum of their weights, so that the parts of a
    batch weigh as the whole.
    """
    if target.classes:
        classes_B = truth_B.long()
        each_B = nn.functional.cross_entropy(outputs_BK, classes_B, reduction="none")
        return {"ce": (weight_K.to(each_B)[classes_B] * each_B).mean()}
    function = nn.functional.smooth_l1_loss if name == "smooth_l1" else nn.functional.mse_loss
    return {name: function(outputs_BK[:, 0], truth_B.to(outputs_BK))}


def class_weights(target: Target, train: Sequence[int], kind: str) -> Tensor:
    """A weight of each class, (K,) float64, as scikit-learn balances; 1 for classes that no training volume has."""
    weight_K = torch.ones(len(target.classes), dtype=torch.float64)
    if kind == "balanced" and target.classes:
        count_K = torch.bincount(torch.tensor([int(target.value_of[i]) for i in train]), minlength=len(weight_K))
        there_K = count_K > 0
        weight_K[there_K] = len(train) / (there_K.sum() * count_K[there_K].double())
    return weight_K


def probe_batches(
    features_NE: Tensor, volumes: Sequence[int], config: FinetuneConfig, ranks: Collectives, *, seed: int, step: int
) -> Iterator[ViewBatch]:
    """Views of a linear probe, from a step on: features (B, E, 1, 1, 1) in place of crops.

    Every pass goes through all volumes in an order of its own, by seed and pass.

    Args:
        features_NE: On the engine's device and in its type.
        volumes: Manifest index of each row.
        config: Settings.
        ranks: Each takes its part of a batch.
        seed: Of the orders.
        step: Optimizer steps done.
    """
    count, each = len(volumes), config.batch // ranks.world
    volume_N = torch.tensor(list(volumes), device=features_NE.device)
    while True:
        first = step * config.batch + ranks.rank * each
        samples = range(first, first + each)
        orders = {e: np.random.Generator(np.random.Philox(key=[seed, e])).permutation(count)
                  for e in {sample // count for sample in samples}}  # fmt: skip
        rows_B = torch.tensor([int(orders[sample // count][sample % count]) for sample in samples])
        rows_B = rows_B.to(features_NE.device)
        ones_B3 = torch.ones(each, 3, dtype=torch.float64, device=features_NE.device)
        view = View(
            image_BCDHW=features_NE[rows_B][:, :, None, None, None],
            to_volume_B34=torch.zeros(each, 3, 4, dtype=torch.float64, device=features_NE.device),
            position_B3=ones_B3 / 2,
            valid_B1DHW=torch.ones(each, 1, 1, 1, 1, device=features_NE.device),
        )
        sample_B = torch.tensor(list(samples), device=features_NE.device)
        yield ViewBatch({"patch": (view,)}, volume_N[rows_B], sample_B, ones_B3, ones_B3)
        step += 1
