"""How a volume is cut into chunks and shards.

A chunk is the unit of decoding, a shard the unit of storing (one object). Reading an unaligned crop of edge c from
chunks of edge k decodes (c + k - 1)^3 voxels on average: with k = c/3 that is 2.3 times the crop, with k = 2c/3 4.5
times; smaller chunks decode less and cost more calls and a worse compression ratio. Chunks divide each axis evenly, so
that no edge chunk is mostly padding; a volume of one chunk or of few megabytes is a single object.
"""

from dataclasses import dataclass
from math import ceil, prod

from storage.errors import ConfigError
from storage.format.codecs import COMPRESSOR, COMPRESSORS

Triple = tuple[int, int, int]
SHARD_BYTES = 64 << 20
"""Largest raw shard: one request can write it, and at the usual 2:1 it stays near the sizes stores handle best."""
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Chunk and shard edges in voxels, each shard edge a multiple of the chunk edge; and blosc's compressor."""

    chunk_DHW: Triple
    shard_DHW: Triple
    compressor: str = COMPRESSOR

    def __post_init__(self) -> None:
        if self.compressor not in COMPRESSORS:
            raise ConfigError(
                "layout", expected=f"a compressor among {', '.join(COMPRESSORS)}", found=repr(self.compressor)
            )
        if any(c < 1 or s < c or s % c for c, s in zip(self.chunk_DHW, self.shard_DHW, strict=True)):
            raise ConfigError(
                "layout",
                expected="shard edges that are multiples of positive chunk edges",
                found=f"chunk {self.chunk_DHW}, shard {self.shard_DHW}",
            )


def choose_layout(
    shape_DHW: Triple, crop_DHW: Triple = (96, 96, 96), *, itemsize: int = 2, channels: int = 1
) -> Layout:
    """The layout for a volume that will mostly be read as crops of `crop_DHW`.

    Args:
        shape_DHW: The volume's extent in voxels.
        crop_DHW: The usual crop.
        itemsize: Bytes a stored value.
        channels: Channels that share a shard.

    Raises:
        ConfigError: an extent or crop edge below 1.
    """
    if any(n < 1 for n in (*shape_DHW, *crop_DHW)):
        raise ConfigError("layout", expected="extents of at least 1", found=f"shape {shape_DHW}, crop {crop_DHW}")
    chunk = [
        _even(n, min(LARGEST_CHUNK, max(SMALLEST_CHUNK, ceil(c / 3)))) for n, c in zip(shape_DHW, crop_DHW, strict=True)
    ]
    grid = [ceil(n / k) for n, k in zip(shape_DHW, chunk, strict=True)]
    pieces = [1, 1, 1]

    def shard() -> list[int]:
        return [k * ceil(g / p) for k, g, p in zip(chunk, grid, pieces, strict=True)]

    while prod(shard()) * itemsize * channels > SHARD_BYTES and any(p < g for p, g in zip(pieces, grid, strict=True)):
        # Halving the longest edge keeps shards near cubes, which a crop meets least often.
        axis = max((a for a in range(3) if pieces[a] < grid[a]), key=lambda a: shard()[a])
        pieces[axis] += 1
    d, h, w = shard()
    return Layout((chunk[0], chunk[1], chunk[2]), (d, h, w))


def _even(extent: int, target: int) -> int:
    return ceil(extent / max(1, round(extent / target)))
