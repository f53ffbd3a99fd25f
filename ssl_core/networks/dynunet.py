"""MONAI DynUNet: nnU-Net's plain or residual U-Net with free kernels and strides."""

from typing import Any

from monai.networks.nets.dynunet import DynUNet
from torch import Tensor, nn

from ssl_core.networks.pyramid import Architecture, Geometry, cumulative

_STRIDES = (1, 2, 2, 2)


def _make(**arguments: Any) -> DynUNet:
    full = _full(arguments)
    if full.get("deep_supervision"):
        raise ValueError("deep_supervision=False: its heads change what the network returns in training")
    return DynUNet(**full)


def _full(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with defaults; up-sampling kernels follow the strides."""
    strides = arguments.get("strides", _STRIDES)
    defaults = {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "strides": strides,
        "kernel_size": (3,) * len(strides),
        "upsample_kernel_size": strides[1:],
        "filters": (16, 32, 64, 128, 256, 320)[: len(strides)],
    }
    return defaults | arguments


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return (int(value),) * dims if isinstance(value, int) else tuple(value)


def _geometry(arguments: dict[str, Any]) -> list[Geometry]:
    full = _full(arguments)
    dims = full["spatial_dims"]
    steps: list[tuple[tuple[int, ...], tuple[float, ...] | None]] = []
    for kernel, stride in zip(full["kernel_size"], full["strides"], strict=True):
        k, s = _tuple(kernel, dims), _tuple(stride, dims)
        # Padding as the stock blocks choose it: floor((k - s + 1) / 2).
        centre = tuple(a / 2 - (a - b + 1) // 2 for a, b in zip(k, s, strict=True))
        mixed = full.get("res_block") and any(c != 0.5 for c in centre)  # the 1x1x1 shortcut is centred at 0.5
        steps.append((s, None if mixed else centre))
    return cumulative(steps)


def _stages(net: DynUNet) -> list[tuple[str, nn.Module]]:
    downs = [(f"downsamples.{i}", m) for i, m in enumerate(net.downsamples)]
    return [("input_block", net.input_block), *downs, ("bottleneck", net.bottleneck)]


def _encode(net: DynUNet, x: Tensor, upto: int) -> list[Tensor]:
    maps = []
    for _, stage in _stages(net)[: upto + 1]:
        x = stage(x)
        maps.append(x)
    return maps


def _decode(net: DynUNet, features: list[Tensor]) -> list[Tensor]:
    maps = [features[-1]]
    for up, skip in zip(net.upsamples, features[-2::-1], strict=True):
        maps.append(up(maps[-1], skip))
    return maps[1:]


def _twins(net: DynUNet) -> list[str]:
    """The stock network registers every block a second time inside `skip_layers`, by the same tensors."""
    names, prefix = [], "skip_layers"
    for _ in range(len(net.downsamples) + 1):
        names.append(f"{prefix}.downsample")
        prefix += ".next_layer"
    return [*names, prefix]


def _level_prefixes(net: DynUNet, level: int) -> list[str]:
    return [name for name, _ in _stages(net)[: level + 1]] + _twins(net)[: level + 1]


def _decoder_prefixes(net: DynUNet) -> list[str]:
    return ["upsamples", *(name.removesuffix("downsample") + "upsample" for name in _twins(net)[:-1])]


DYNUNET = Architecture(
    make=_make,
    geometry=_geometry,
    encode=_encode,
    decode=_decode,
    level_prefixes=_level_prefixes,
    encoder_prefixes=lambda net: _level_prefixes(net, len(net.strides) - 1),
    decoder_prefixes=_decoder_prefixes,
    slim=lambda arguments: arguments | {"filters": (8,) * len(_full(arguments)["strides"])},
)
