"""A method small enough to follow by hand, for tests of what surrounds methods."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_core.methods.base import LossTerms, MethodConfig, StepContext
from ssl_core.networks.batch_norm import GlobalBatchNorm
from ssl_core.views.types import RoleSpec, View, ViewBatch, ViewSpec

SIZE = (8, 8, 8)


class Toy(nn.Module):
    """Predicts the view's mean; has what real methods have: a frozen average of the network, a queue, dropout.

    With `contrast` a term compares each sample with all samples of all ranks, so it needs gradients to cross ranks.
    `norm` puts a batch norm into the network, `global_norm` the one over all ranks, which the engine must bind.
    """

    Config = MethodConfig

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        norm: bool = False,
        global_norm: bool = False,
        contrast: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        norms = [GlobalBatchNorm] if global_norm else [nn.BatchNorm3d] if norm else []
        self.online = self._network(dropout, norms)
        self.average = self._network(0.0, norms)
        self.average.load_state_dict(self.online.state_dict())
        self.average.requires_grad_(False)
        self.contrast = contrast
        self.register_buffer("queue_K", torch.zeros(8))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer("full", torch.zeros((), dtype=torch.bool))
        self.recent_B = torch.zeros(0)

    @staticmethod
    def _network(dropout: float, norms: Sequence[Callable[[int], nn.Module]]) -> nn.Sequential:
        middle = [norm(4) for norm in norms]
        return nn.Sequential(
            nn.Conv3d(1, 4, 3), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Conv3d(4, 3, 3, stride=2), nn.Flatten(2)
        )

    @classmethod
    def view_spec(cls, config: Any) -> ViewSpec:
        return ViewSpec((RoleSpec("whole", 1, SIZE),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        x_BCDHW = views.roles["whole"][0].image_BCDHW
        out_BC = self.online(x_BCDHW).mean(dim=2)
        truth_B = x_BCDHW.mean(dim=(1, 2, 3, 4))
        terms = {"fit": (out_BC[:, 0] - truth_B).square().mean(), "size": 0.1 * out_BC.square().mean()}
        if self.contrast:
            keys_KC = ctx.collectives.gather(out_BC)
            own_B = torch.arange(len(out_BC), device=out_BC.device) + ctx.collectives.rank * len(out_BC)
            terms["contrast"] = nn.functional.cross_entropy(out_BC @ keys_KC.T / 0.1, own_B)
        self.recent_B = ctx.collectives.gather(out_BC[:, 1].detach())
        return LossTerms(terms, {"truth": truth_B.mean()})

    @torch.no_grad()
    def after_step(self, ctx: StepContext) -> None:
        for old, new in zip(self.average.parameters(), self.online.parameters(), strict=True):
            old.lerp_(new, 0.1)
        for value in self.recent_B:
            self.queue_K[int(self.place) % len(self.queue_K)] = value
            self.place += 1
        self.full.fill_(bool(self.place >= len(self.queue_K)))

    def encoder(self) -> Any:
        raise NotImplementedError


def batch(first: int, size: int, dtype: torch.dtype = torch.float32) -> ViewBatch:
    """Samples `first` to `first + size - 1`; each depends on its number only."""
    images = []
    for sample in range(first, first + size):
        images.append(torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(sample), dtype=torch.float64))
    image_BCDHW = torch.stack(images).to(dtype)
    return views_of(image_BCDHW, torch.arange(first, first + size))


def views_of(image_BCDHW: Tensor, sample_B: Tensor) -> ViewBatch:
    """Whole volumes as views."""
    size = len(image_BCDHW)
    whole = torch.eye(3, 4, dtype=torch.float64).expand(size, 3, 4)
    view = View(image_BCDHW, whole, torch.full((size, 3), 0.5, dtype=torch.float64), torch.ones_like(image_BCDHW))
    shape_B3 = torch.tensor(image_BCDHW.shape[2:], dtype=torch.float64).expand(size, 3)
    return ViewBatch({"whole": (view,)}, sample_B % 5, sample_B, torch.ones(size, 3, dtype=torch.float64), shape_B3)
