"""In which floating type a device trains, and whether this processor's convolutions in bf16 are right.

oneDNN 3.12, which torch 2.13 computes with on a CPU, takes memory that nobody wrote for the weight gradient of a
convolution in bf16 whose kernel is longer than its map along D: with 3 x 3 x 3 on maps of two slices it is noise of any
size, finite as often as not. So each convolution's gradient is held to that of fp32, once, before it is used.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from storage.errors import ConfigError

MOST_ERROR = 0.25
"""Of the largest weight gradient, by which bf16 may differ from fp32: rounding is a tenth of it, noise exceeds it."""


def resolve_precision(setting: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp64`: what `auto` means on a device."""
    if setting != "auto":
        return setting
    # bf16 has the exponents of fp32, so there is no loss scaling and no scaler to keep.
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def check_convolutions(module: nn.Module) -> None:
    """Have every 3-D convolution that is trained tried once at each shape that it meets, before it computes with it.

    For good, since a frozen one may be trained from a later step on.

    Args:
        module: To be trained on a CPU under autocast to bf16; its forward pass raises what `require_right` does.
    """
    tried: set[Any] = set()

    def before(convolution: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_BCDHW = inputs[0]
        if torch.is_grad_enabled() and cast(Tensor, convolution.weight).requires_grad:
            case = (str(convolution), x_BCDHW.shape, _is_last(x_BCDHW))
            if case not in tried:
                tried.add(case)
                require_right(cast(nn.Conv3d, convolution), x_BCDHW)

    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.register_forward_pre_hook(before)


def require_right_at_all() -> None:
    """Refuse a processor that is known to be wrong somewhere, where shapes cannot be watched: in compiled code.

    Raises:
        ConfigError: as `require_right`.
    """
    require_right(nn.Conv3d(16, 16, 3, padding=1), torch.empty(2, 16, 2, 8, 8))


def require_right(convolution: nn.Conv3d, x_BCDHW: Tensor) -> None:
    """Refuse a convolution whose weight gradient in bf16 is not that of fp32 but for rounding.

    Args:
        convolution: Only its settings count.
        x_BCDHW: Only its shape and layout count.

    Raises:
        ConfigError: names the kernel and the map.
    """
    exact, rounded = (weight_gradient(convolution, x_BCDHW, is_bf16=is_bf16) for is_bf16 in (False, True))
    error = float((rounded - exact).abs().max() / exact.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    if not error <= MOST_ERROR:  # not a number is wrong too
        size, kernel = (" x ".join(map(str, n)) for n in (x_BCDHW.shape[2:], convolution.kernel_size))
        raise ConfigError(
            "precision bf16 on this processor",
            expected="weight gradients of convolutions that differ from fp32 by rounding",
            found=f"wrong ones of a kernel of {kernel} on maps of {size}, by {error:.2g} of the largest",
            remedy="set precision to fp32, or take crops that leave maps of three voxels or more along each axis",
        )


def weight_gradient(convolution: nn.Conv3d, x_BCDHW: Tensor, *, is_bf16: bool) -> Tensor:
    """Gradient of half the squared output, with waves for input and weights: no random number is drawn.

    Args:
        convolution: Its settings are taken.
        x_BCDHW: Its shape, two samples at most, and layout are taken.
        is_bf16: Whether under autocast.
    """
    channels, inputs = convolution.out_channels, convolution.in_channels // convolution.groups
    weight = _wave((channels, inputs, *convolution.kernel_size))
    x = _wave((min(len(x_BCDHW), 2), *x_BCDHW.shape[1:]))
    if _is_last(x_BCDHW):
        weight, x = (tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in (weight, x))
    _dirty()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        weight.requires_grad_()
        settings: Any = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
        y = functional.conv3d(x, weight, None, *settings)
        (gradient,) = torch.autograd.grad(y.float().square().sum() / 2, weight)
    return gradient.detach().float()


def _wave(shape: tuple[int, ...]) -> Tensor:
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float32) * 1.7).reshape(shape)


def _is_last(x_BCDHW: Tensor) -> bool:
    last = x_BCDHW.is_contiguous(memory_format=torch.channels_last_3d)
    return last and not x_BCDHW.is_contiguous()


def _dirty() -> None:
    """Leave noise in the memory that is handed out next, where a young process would read zeros that nobody wrote."""
    waste = [torch.full((1 << power,), float("nan")) for power in range(4, 18) for _ in range(3)]
    waste.clear()
