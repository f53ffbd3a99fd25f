"""Deep supervision: a segmenter's loss at lower decoder levels too, while it trains.

Each level has an output layer of its own, a 1x1x1 convolution, which is thrown away with the training: neither the
network nor what is stored of it knows of them. The maps are taken from the network's own forward pass as it runs.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ssl_core.networks.backbone import Backbone
from ssl_core.networks.outline import NEEDS_NUMBERS, outline, shapes_only
from storage.errors import ConfigError

KEY = "finetune.deep_supervision"
Tap: TypeAlias = tuple[str, int, tuple[int, int, int]]
"""Module of the stock network that puts out a map, the map's channels, and its stride (D, H, W)."""


class AuxiliaryOutputs(nn.Module):
    """Output layers on the decoder levels below the output, finest first.

    Args:
        backbone: Whose maps they are.
        levels: How many.
        seed: Of their random weights.

    Attributes:
        strides: Input voxels between neighbouring positions of each, (D, H, W).

    Raises:
        ConfigError: the backbone does not have so many.
    """

    def __init__(self, backbone: Backbone, levels: int, seed: int) -> None:
        super().__init__()
        classes = int(backbone.arguments.get("out_channels", 2))
        taps = require_levels(backbone.name, backbone.arguments, levels)
        self._taps = [name for name, _, _ in taps]
        self.strides = [stride for _, _, stride in taps]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(nn.Conv3d(channels, classes, 1) for _, channels, _ in taps)

    def forward(self, backbone: Backbone, x_BCDHW: Tensor) -> list[Tensor]:
        """Logits of the output, as the network itself gives them, and then of each level, finest first."""
        with _tapped(backbone.net, self._taps) as maps:
            logits = backbone.logits(x_BCDHW)
        depth = x_BCDHW.shape[2]
        levels = [_unfolded(maps[name], depth) for name in self._taps]
        return [logits, *(layer(level) for layer, level in zip(self.layers, levels, strict=True))]


def weights(count: int) -> list[float]:
    """Weights of so many outputs, finest first: halved from each to the next, 1 in all (nnU-Net)."""
    shares = [0.5**i for i in range(count)]
    return [share / sum(shares) for share in shares]


def coarser(classes_BDHW: Tensor, stride_DHW: tuple[int, int, int]) -> Tensor:
    """Class numbers at a lower level: of the voxel at the middle of each position's block, as torch's `nearest-exact`.

    Args:
        classes_BDHW: Class numbers; sizes are multiples of the stride.
        stride_DHW: Voxels of a block.
    """
    d, h, w = stride_DHW
    return classes_BDHW[:, d // 2 :: d, h // 2 :: h, w // 2 :: w]


def require_levels(name: str, arguments: Mapping[str, Any], levels: int) -> tuple[Tap, ...]:
    """Module of the network, channels and stride of so many decoder levels below the output, finest first.

    Found by what a pass over shapes alone puts out, so that no network needs code for it.

    Args:
        name: Registered name of the backbone.
        arguments: Its keyword arguments.
        levels: How many.

    Raises:
        ConfigError: the network has fewer, or its decoder's maps cannot be told from shapes; names the setting.
    """
    try:
        taps = _taps(name, json.dumps(arguments, sort_keys=True))
    except NEEDS_NUMBERS as error:
        raise ConfigError(
            KEY,
            expected="0 with a network whose shapes follow from numbers",
            found=f"{levels} with {name}",
            remedy=f"set {KEY}=0",
        ) from error
    if len(taps) < levels:
        raise ConfigError(
            KEY,
            expected=f"at most {len(taps)}, the decoder levels of {name} below its output",
            found=str(levels),
            remedy=f"lower {KEY}",
        )
    return taps[:levels]


@lru_cache(maxsize=64)
def _taps(name: str, arguments: str) -> tuple[Tap, ...]:
    modules: dict[int, str] = {}
    alive: list[Tensor] = []

    def note(module_name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                modules[_memory(output)] = (
                    module_name  # of nested modules with one output the outermost, which ends last
                )
                alive.append(output)  # so that no other tensor has its place

        return hook

    with shapes_only(), torch.no_grad():
        network = outline(name, {"out_channels": 2, **json.loads(arguments)}).eval()
        d, h, w = (2 * stride for stride in network.multiple_DHW())
        features = network.features(torch.zeros(1, int(network.arguments.get("in_channels", 1)), d, h, w))
        handles = [module.register_forward_hook(note(key)) for key, module in network.net.named_modules()]
        maps = network.decode(features)
        for handle in handles:
            handle.remove()
        pairs = list(zip(network.decoder_levels, map(_memory, maps), strict=True))[::-1]
    return tuple(
        (modules[memory], level.channels, level.stride_DHW)
        for level, memory in pairs
        if max(level.stride_DHW) > 1 and memory in modules
    )


def _memory(tensor: Tensor) -> int:
    """Where the numbers of a tensor lie, which its views share; tensors of shapes alone have no address."""
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


@contextmanager
def _tapped(net: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """What the modules of these names put out within it, by name."""
    maps: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            maps[name] = output

        return hook

    handles = [net.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def _unfolded(level: Tensor, depth: int) -> Tensor:
    """A map of a 2-D network, whose slices lie in the batch, as one of volumes."""
    return level if level.dim() == 5 else level.unflatten(0, (-1, depth)).transpose(1, 2)
