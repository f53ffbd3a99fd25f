"""Batch norm over the global batch, on any device and in any float type.

`torch.nn.SyncBatchNorm` refuses CPU tensors and finds its process group by itself. This one reads statistics through
the `Collectives` that the engine binds, so one rank on a joined batch and several ranks on its parts normalise alike,
on gloo and NCCL, and equal `torch.nn.BatchNorm` on one rank.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl_core.distributed import Collectives, Single


class GlobalBatchNorm(nn.Module):
    """Batch norm over axis 0 and all axes from 2 on, with the state dict of `torch.nn.BatchNorm1d/2d/3d`.

    Statistics are taken in at least float32, whatever autocast does. Ranks must hold equally many values, as all
    views of a run do.

    Args:
        channels: Size of axis 1.
        eps: Added to the variance.
        momentum: Weight of the newest batch in the running statistics.
        affine: Whether it learns a scale and a shift.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.collectives: Collectives = Single()

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x`, in its own float type."""
        wide = x if x.dtype == torch.float64 else x.float()
        mean, var = self._batch(wide) if self.training else self._running(wide.dtype)
        return self._normalised(wide, mean, var).to(x.dtype)

    def forward_linear(self, x: Tensor, weight_CI: Tensor, bias_C: Tensor | None, chosen_NI: Tensor) -> Tensor:
        """`forward` of a linear layer's output at a few rows, (N, C), without the output at all the others.

        The mean of W x + b is W m + b and the variance of its channel c is w_c . S w_c, with m and S the mean and
        covariance of x: they are exact, and cost a map of I channels instead of one of C.

        Args:
            x: The layer's input, its I channels along axis 1, of which the statistics are taken.
            weight_CI: W.
            bias_C: b.
            chosen_NI: Rows whose output is wanted.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = weight_CI.to(dtype), None if bias_C is None else bias_C.to(dtype)
            out = functional.linear(chosen_NI.to(dtype), weight, bias)
            if not self.training:
                return self._normalised(out, *self._running(dtype)).to(x.dtype)
            rows = x.movedim(1, -1).reshape(-1, x.shape[1]).to(dtype)
            centre = self.collectives.mean(rows.mean(0))
            # Around the mean, moving the centre does not change the covariance, so it needs no gradient.
            centred = rows - centre.detach()
            spread = self.collectives.mean(centred.t() @ centred / len(rows))
            mean, var = functional.linear(centre, weight, bias), ((weight @ spread) * weight).sum(1)
            self._track(mean, var, len(rows))
            return self._normalised(out, mean, var).to(x.dtype)

    def _running(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.running_mean.to(dtype), self.running_var.to(dtype)

    def _batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axes = [0, *range(2, x.dim())]
        mean = self.collectives.mean(x.mean(axes))
        centred = x - mean.view((1, -1) + (1,) * (x.dim() - 2))
        # Two passes: the mean of squares less the square of the mean cancels in float32.
        var = self.collectives.mean(centred.square().mean(axes))
        self._track(mean, var, x.numel() // self.channels)
        return mean, var

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, values: int) -> None:
        count = self.collectives.world * values
        unbiased = var.detach() * (count / max(count - 1, 1))
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)

    def _normalised(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.to(x.dtype)
        # Subtracting first keeps the digits of channels whose mean is large against their spread.
        out = (x - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            out = out + self.bias.to(x.dtype).view(shape)
        return out


def bind(module: nn.Module, collectives: Collectives) -> None:
    """Make every `GlobalBatchNorm` in `module` take its statistics through `collectives`.

    The engine does it for the method it trains; whoever trains one without an engine does it too.
    """
    for part in module.modules():
        if isinstance(part, GlobalBatchNorm) and part.collectives is not collectives:
            part.collectives = collectives


def globalise(module: nn.Module) -> nn.Module:
    """Replace every `torch.nn.BatchNorm` in `module` by one over the global batch; state dict names stay the same."""
    for name, part in list(module.named_children()):
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, _twin(part))
        else:
            globalise(part)
    return module


def _twin(norm: nn.modules.batchnorm._BatchNorm) -> GlobalBatchNorm:
    if not norm.track_running_stats or norm.momentum is None:
        raise ValueError("batch norm without running statistics or with a cumulative average is not supported")
    twin = GlobalBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine)
    twin.load_state_dict(norm.state_dict())
    return twin.to(norm.running_mean.dtype if norm.running_mean is not None else torch.float32)
