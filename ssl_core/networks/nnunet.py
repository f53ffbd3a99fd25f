"""nnU-Net's networks: the residual encoder U-Net, presets S, M and L, and the plain one. They need the extra `resenc`.

The stock classes are `ResidualEncoderUNet` and `PlainConvUNet` of dynamic-network-architectures, with nnU-Net's
instance norm and leaky ReLU and its plans for isotropic 3-D data. Both have one decoder.
"""

from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor

from ssl_core.networks.pyramid import Architecture, Geometry, cumulative
from ssl_core.portable.network import with_classes

# L has nnU-Net's residual blocks per stage and widths; nnU-Net's own M differs from it only in the patch that its
# memory holds, so a lighter M and S are our choice.
_BLOCKS = {"S": (2, 2, 2, 2, 2, 2), "M": (1, 3, 4, 6, 6), "L": (1, 3, 4, 6, 6, 6)}
# Measured once by `ssl_core.networks.feature_centres.measure`, in input voxels: minutes at every start otherwise. A
# level's centre depends on the levels before it only, so M has L's.
_CENTRES = {
    "S": (0.5, 0.605, 0.820, 1.197, 2.343, 2.553),
    "M": (0.5, 0.591, 0.809, 1.429, 3.254),
    "L": (0.5, 0.591, 0.809, 1.429, 3.254, 3.983),
}
_WIDTHS = (32, 64, 128, 256, 320, 320, 320, 320)


def _full(arguments: dict[str, Any]) -> dict[str, Any]:
    preset = arguments.get("preset", "M")
    if preset not in _BLOCKS:
        raise ValueError(f"preset one of {', '.join(_BLOCKS)}")
    blocks = tuple(arguments.get("n_blocks_per_stage", _BLOCKS[preset]))
    own = {"n_blocks_per_stage": blocks, "n_conv_per_stage_decoder": 1}
    return _defaults(len(blocks)) | own | {k: v for k, v in arguments.items() if k != "preset"}


def _defaults(stages: int) -> dict[str, Any]:
    """Arguments that nnU-Net's networks of so many stages share, for isotropic data."""
    return {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "n_stages": stages,
        "features_per_stage": _WIDTHS[:stages],
        "strides": (1, *(2,) * (stages - 1)),
        "kernel_sizes": (3,) * stages,
    }


def _per_axis(value: Any, dims: int, stages: int) -> list[tuple[int, ...]]:
    """Sizes of each stage along each axis, from a number for all, or one or several for each stage."""
    each = [value] * stages if isinstance(value, int) else list(value)
    return [(int(size),) * dims if isinstance(size, int) else tuple(int(n) for n in size) for size in each]


def _stock_of(full: dict[str, Any]) -> dict[str, Any]:
    """Arguments of nnU-Net's classes from those of this project, with nnU-Net's norm and activation."""
    full = dict(full)
    dims = full.pop("spatial_dims")
    return {
        "input_channels": full.pop("in_channels"),
        "num_classes": full.pop("out_channels"),
        "conv_op": {"torch.nn": f"Conv{dims}d"},
        "norm_op": {"torch.nn": f"InstanceNorm{dims}d"},
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": {"torch.nn": "LeakyReLU"},
        "nonlin_kwargs": {"inplace": True},
        "conv_bias": True,
        "deep_supervision": False,
        **full,
    }


def _stock(arguments: dict[str, Any]) -> dict[str, Any]:
    return _stock_of(_full(arguments))


def _make(**arguments: Any) -> ResidualEncoderUNet:
    return ResidualEncoderUNet(**with_classes(_stock(arguments)))


def _geometry(arguments: dict[str, Any]) -> list[Geometry]:
    full = _full(arguments)
    dims = full["spatial_dims"]
    steps: list[tuple[tuple[int, ...], tuple[float, ...] | None]] = []
    for stride in _per_axis(full["strides"], dims, full["n_stages"]):
        # A strided block adds a strided convolution, centred at 0.5, to an average pool, centred in its cell.
        steps.append((stride, (0.5,) * dims if max(stride) == 1 else None))
    geometry = cumulative(steps)
    for preset, centres in _CENTRES.items():
        same = ("n_blocks_per_stage", "strides", "kernel_sizes", "spatial_dims")
        if all(_tuples(full[key]) == _tuples(_full({"preset": preset})[key]) for key in same):
            return [Geometry(g.stride, (c,) * dims) for g, c in zip(geometry, centres, strict=True)]
    return geometry


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _encode(net: ResidualEncoderUNet, x: Tensor, upto: int) -> list[Tensor]:
    x = net.encoder.stem(x)
    maps = []
    for stage in net.encoder.stages[: upto + 1]:
        x = stage(x)
        maps.append(x)
    return maps


def _decode(net: Any, features: list[Tensor]) -> list[Tensor]:
    """The decoder's maps, coarsest first, of nnU-Net's networks: all have the same one."""
    maps = [features[-1]]
    for up, stage, skip in zip(net.decoder.transpconvs, net.decoder.stages, features[-2::-1], strict=True):
        maps.append(stage(torch.cat([up(maps[-1]), skip], dim=1)))
    return maps[1:]


def _level_prefixes(net: ResidualEncoderUNet, level: int) -> list[str]:
    # The stock decoder registers the encoder a second time, by the same tensors.
    own = ["encoder.stem", *(f"encoder.stages.{i}" for i in range(level + 1))]
    return own + [f"decoder.{name}" for name in own]


RESENC = Architecture(
    make=_make,
    geometry=_geometry,
    encode=_encode,
    decode=_decode,
    level_prefixes=_level_prefixes,
    encoder_prefixes=lambda net: ["encoder", "decoder.encoder"],
    decoder_prefixes=lambda net: ["decoder.transpconvs", "decoder.stages"],
    slim=lambda arguments: arguments | {"features_per_stage": (8,) * _full(arguments)["n_stages"]},
    stock=_stock,
)


def _plain_full(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with defaults: those of nnU-Net's plans for isotropic 3-D data, of five stages."""
    stages = int(arguments.get("n_stages", len(arguments.get("features_per_stage", range(5)))))
    return _defaults(stages) | {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2} | arguments


def _plain_stock(arguments: dict[str, Any]) -> dict[str, Any]:
    return _stock_of(_plain_full(arguments))


def _plain_make(**arguments: Any) -> PlainConvUNet:
    return PlainConvUNet(**with_classes(_plain_stock(arguments)))


def _plain_geometry(arguments: dict[str, Any]) -> list[Geometry]:
    full = _plain_full(arguments)
    dims = full["spatial_dims"]
    strides, kernels = (_per_axis(full[key], dims, full["n_stages"]) for key in ("strides", "kernel_sizes"))
    # The first convolution of a stage has the stride; its padding is floor((k - 1) / 2).
    centres = [tuple(k / 2 - (k - 1) // 2 for k in kernel) for kernel in kernels]
    return cumulative(list(zip(strides, centres, strict=True)))


def _plain_encode(net: PlainConvUNet, x: Tensor, upto: int) -> list[Tensor]:
    maps = []
    for stage in net.encoder.stages[: upto + 1]:
        x = stage(x)
        maps.append(x)
    return maps


def _plain_level_prefixes(_net: PlainConvUNet, level: int) -> list[str]:
    # The stock decoder registers the encoder a second time, by the same tensors.
    own = [f"encoder.stages.{i}" for i in range(level + 1)]
    return own + [f"decoder.{name}" for name in own]


PLAIN_UNET = Architecture(
    make=_plain_make,
    geometry=_plain_geometry,
    encode=_plain_encode,
    decode=_decode,
    level_prefixes=_plain_level_prefixes,
    encoder_prefixes=lambda net: ["encoder", "decoder.encoder"],
    decoder_prefixes=lambda net: ["decoder.transpconvs", "decoder.stages"],
    slim=lambda arguments: arguments | {"features_per_stage": (8,) * _plain_full(arguments)["n_stages"]},
    stock=_plain_stock,
)
