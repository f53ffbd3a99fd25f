"""nnU-Net's plain U-Net, of its default plans. Needs the extra `resenc`.

The stock class is `PlainConvUNet` of dynamic-network-architectures, with nnU-Net's instance norm, leaky ReLU and
strided convolutions in place of pooling.
"""

from typing import Any

from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor

from ssl_core.networks.pyramid import Architecture, Geometry, cumulative
from ssl_core.networks.resenc import decode, defaults_of, per_axis, stock_of
from ssl_core.portable.network import with_classes


def _full(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with defaults: those of nnU-Net's plans for isotropic 3-D data, of five stages."""
    stages = int(arguments.get("n_stages", len(arguments.get("features_per_stage", range(5)))))
    return defaults_of(stages) | {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2} | arguments


def _stock(arguments: dict[str, Any]) -> dict[str, Any]:
    return stock_of(_full(arguments))


def _make(**arguments: Any) -> PlainConvUNet:
    return PlainConvUNet(**with_classes(_stock(arguments)))


def _geometry(arguments: dict[str, Any]) -> list[Geometry]:
    full = _full(arguments)
    dims = full["spatial_dims"]
    strides, kernels = (per_axis(full[key], dims, full["n_stages"]) for key in ("strides", "kernel_sizes"))
    # The first convolution of a stage has the stride; its padding is floor((k - 1) / 2).
    centres = [tuple(k / 2 - (k - 1) // 2 for k in kernel) for kernel in kernels]
    return cumulative(list(zip(strides, centres, strict=True)))


def _encode(net: PlainConvUNet, x: Tensor, upto: int) -> list[Tensor]:
    maps = []
    for stage in net.encoder.stages[: upto + 1]:
        x = stage(x)
        maps.append(x)
    return maps


def _level_prefixes(_net: PlainConvUNet, level: int) -> list[str]:
    # The stock decoder registers the encoder a second time, by the same tensors.
    own = [f"encoder.stages.{i}" for i in range(level + 1)]
    return own + [f"decoder.{name}" for name in own]


PLAIN_UNET = Architecture(
    make=_make,
    geometry=_geometry,
    encode=_encode,
    decode=decode,
    level_prefixes=_level_prefixes,
    encoder_prefixes=lambda net: ["encoder", "decoder.encoder"],
    decoder_prefixes=lambda net: ["decoder.transpconvs", "decoder.stages"],
    slim=lambda arguments: arguments | {"features_per_stage": (8,) * _full(arguments)["n_stages"]},
    stock=_stock,
)
