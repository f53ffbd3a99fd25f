"""One class for every backbone; what differs between networks is data and four functions.

A 2-D network works on volumes too: slices along D are folded into the batch, so that its maps have stride 1 and one
feature a slice along D, and every method runs on it unchanged.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssl_core.networks.backbone import Level
from ssl_core.networks.batch_norm import globalise
from ssl_core.networks.recompute import has_batch_norm, in_parts
from storage.errors import ConfigError

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """Where the features of one level lie, along the network's own 2 or 3 axes.

    Attributes:
        stride: Input voxels between neighbouring features.
        offset: Centre of feature 0 in input edge coordinates; `None` where only a measurement can tell.
    """

    stride: tuple[int, ...]
    offset: tuple[float, ...] | None


def cumulative(steps: Sequence[tuple[tuple[int, ...], tuple[float, ...] | None]]) -> list[Geometry]:
    """Geometry after each of a chain of layers.

    Args:
        steps: For each layer its stride and the centre of its output 0 in its own input's edge coordinates: 0.5 for odd
            kernels with "same" padding, half the stride for pooling; `None` when paths of different centres are added.
    """
    stride: tuple[int, ...] = (1,) * len(steps[0][0])
    offset: tuple[float, ...] | None = (0.5,) * len(stride)
    layers = []
    for step, centre in steps:
        if offset is not None and centre is not None:
            # Feature j of the layer before has edge coordinate j + 0.5 there and stride * j + offset in the input.
            offset = tuple(o + s * (c - 0.5) for o, s, c in zip(offset, stride, centre, strict=True))
        else:
            offset = None
        stride = tuple(a * b for a, b in zip(stride, step, strict=True))
        layers.append(Geometry(stride, offset))
    return layers


@dataclass(frozen=True)
class Architecture:
    """How to see a stock network as a pyramid.

    Attributes:
        make: The stock network from its arguments.
        geometry: Levels of the encoder from the arguments, finest first.
        encode: Maps of the levels up to and including the given one.
        decode: Decoder maps, coarsest first, from encoder maps.
        level_prefixes: State dict prefixes that a level's map depends on.
        encoder_prefixes: State dict prefixes of the whole encoder.
        decoder_prefixes: State dict prefixes that `decode` uses.
        slim: Arguments of a narrow network with the same geometry, for measuring.
        stock: Arguments of the stock class itself, where `make` takes others: plain values, and `{"torch.nn": NAME}`
            where the class wants a class. None where `make` passes its arguments on.
    """

    make: Callable[..., nn.Module]
    geometry: Callable[[dict[str, Any]], list[Geometry]]
    encode: Callable[[Any, Tensor, int], list[Tensor]]
    decode: Callable[[Any, list[Tensor]], list[Tensor]]
    level_prefixes: Callable[[Any, int], list[str]]
    encoder_prefixes: Callable[[Any], list[str]]
    decoder_prefixes: Callable[[Any], list[str]]
    slim: Callable[[dict[str, Any]], dict[str, Any]]
    stock: Callable[[dict[str, Any]], dict[str, Any]] | None = None


class Pyramid(nn.Module):
    """A stock network behind the `Backbone` contract.

    Args:
        name: Registered name.
        architecture: See `Architecture`.
        arguments: Keyword arguments of the stock class.
        offsets: Measured offsets of the levels, used where the geometry does not know them.

    Attributes:
        parts: Parts of a batch that `features` and `decode` work on one after the other; see `cut_batches`.
    """

    def __init__(
        self,
        name: str,
        architecture: Architecture,
        arguments: dict[str, Any],
        offsets: Sequence[tuple[float, ...]],
    ) -> None:
        super().__init__()
        self.name, self.arguments, self.parts = name, copy.deepcopy(arguments), 1
        self.dims = int(arguments.get("spatial_dims", 3))
        self._architecture = architecture
        self.net = globalise(architecture.make(**arguments))
        self._strides = [self._triple(g.stride, 1) for g in architecture.geometry(arguments)]
        self.levels, self.decoder_levels = self._describe(offsets)

    def features(self, x_BCDHW: Tensor, upto: int | None = None) -> list[Tensor]:
        """See `Backbone.features`.

        Raises:
            ConfigError: the size is not a multiple of the deepest stride wanted, or too small for instance norm.
        """
        last = len(self.levels) - 1 if upto is None else upto
        self._check(x_BCDHW, last)
        depth = x_BCDHW.shape[2]

        def encode(part: list[Tensor]) -> list[Tensor]:
            return [self._unfold(f, depth) for f in self._architecture.encode(self.net, self._fold(part[0]), last)]

        return in_parts(encode, [x_BCDHW], self.parts)

    def decode(self, features: list[Tensor], skips: bool = True) -> list[Tensor]:
        """See `Backbone.decode`."""
        depth = features[0].shape[2]
        inputs = features if skips else [torch.zeros_like(f) for f in features[:-1]] + features[-1:]

        def decode(part: list[Tensor]) -> list[Tensor]:
            maps = self._architecture.decode(self.net, [self._fold(f) for f in part])
            return [self._unfold(f, depth) for f in maps]

        return in_parts(decode, inputs, self.parts)

    def logits(self, x_BCDHW: Tensor) -> Tensor:
        """See `Backbone.logits`."""
        self._check(x_BCDHW, len(self.levels) - 1)
        return self._unfold(self.net(self._fold(x_BCDHW)), x_BCDHW.shape[2])

    def encoder_keys(self) -> list[str]:
        """See `Backbone.encoder_keys`."""
        return self._keys(self._architecture.encoder_prefixes(self.net))

    def level_keys(self, level: int) -> list[str]:
        """See `Backbone.level_keys`."""
        return self._keys(self._architecture.level_prefixes(self.net, level))

    def decoder_keys(self) -> list[str]:
        """See `Backbone.decoder_keys`."""
        return self._keys(self._architecture.decoder_prefixes(self.net))

    def multiple_DHW(self) -> Triple:
        """See `Backbone.multiple_DHW`."""
        return self._strides[-1]

    def _keys(self, prefixes: list[str]) -> list[str]:
        return [k for k in self.net.state_dict() if any(k == p or k.startswith(p + ".") for p in prefixes)]

    def _triple(self, values: tuple[Any, ...], first: Any) -> Any:
        return values if len(values) == 3 else (first, *values)

    def _fold(self, x: Tensor) -> Tensor:
        return x if self.dims == 3 else x.transpose(1, 2).flatten(0, 1)

    def _unfold(self, x: Tensor, depth: int) -> Tensor:
        return x if self.dims == 3 else x.unflatten(0, (-1, depth)).transpose(1, 2)

    def _check(self, x: Tensor, last: int) -> None:
        size, stride = tuple(x.shape[2:]), self._strides[last]
        if any(n % s or n == 0 for n, s in zip(size, stride, strict=True)):
            raise ConfigError(
                f"input of backbone {self.name!r}", expected=f"sizes that are multiples of {stride}", found=str(size)
            )
        positions = [n // s for n, s in zip(size, stride, strict=True)][3 - self.dims :]
        instance = any(isinstance(m, nn.modules.instancenorm._InstanceNorm) for m in self.net.modules())
        if self.training and instance and max(positions) == 1:
            raise ConfigError(
                f"input of backbone {self.name!r}",
                expected="more than one position at the deepest level, which instance norm needs in training",
                found=f"{size} with a deepest stride of {stride}",
                remedy="use larger views, fewer levels, or group norm",
            )

    def _describe(self, offsets: Sequence[tuple[float, ...]]) -> tuple[tuple[Level, ...], tuple[Level, ...]]:
        """Channels and decoder strides from a pass without data on the meta device."""
        twin = _without_data(self.net).eval()
        size = [2 * s for s in self._strides[-1][3 - self.dims :]]
        first = next(iter(self.net.parameters())).dtype
        channels = int(self.arguments.get("in_channels", 1))
        with torch.no_grad():
            x = torch.empty((1, channels, *size), device="meta", dtype=first)
            maps = self._architecture.encode(twin, x, len(self._strides) - 1)
            decoded = self._architecture.decode(twin, maps)
        for number, (f, stride) in enumerate(zip(maps, self._strides, strict=True)):
            due = [n // s for n, s in zip(size, stride[3 - self.dims :], strict=True)]
            if list(f.shape[2:]) != due:
                raise ValueError(
                    f"kernels and strides that make {due} positions of {size} at level {number} (odd kernels do), not"
                    f" {list(f.shape[2:])}"
                )
        levels = tuple(
            Level(int(f.shape[1]), s, self._triple(tuple(o), 0.5))
            for f, s, o in zip(maps, self._strides, offsets, strict=True)
        )
        by_size = {tuple(f.shape[2:]): level for f, level in zip(maps, levels, strict=True)}
        # A decoder map lies where the encoder map of its resolution lies: stock decoders add or concatenate the two.
        decoder = tuple(
            Level(int(f.shape[1]), by_size[tuple(f.shape[2:])].stride_DHW, by_size[tuple(f.shape[2:])].offset_DHW)
            for f in decoded
        )
        return levels, decoder


def _without_data(net: nn.Module) -> nn.Module:
    """A copy on the meta device; no weights are copied for it."""
    memo: dict[int, Any] = {}
    for tensor in (*net.parameters(), *net.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(net, memo)


def cut_batches(module: nn.Module, parts: int) -> None:
    """Let every backbone in `module` work on its batches in so many parts.

    Gradients are those of the whole batch but for rounding; the price is a second forward pass.

    Raises:
        ConfigError: a backbone has batch norm, which would see one part only.
    """
    for backbone in module.modules():
        if not isinstance(backbone, Pyramid) or backbone.parts == parts:
            continue
        if parts > 1 and has_batch_norm(backbone.net):
            raise ConfigError(
                "engine.micro_batch",
                expected="a network without batch norm, which wants to see all samples of a batch at once",
                found=f"batch norm in {backbone.name}",
                remedy="use instance or group norm, or leave micro_batch empty",
            )
        backbone.parts = parts
