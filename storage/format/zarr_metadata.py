"""The Zarr v3 and OME-Zarr 0.5 metadata of a volume, written and read."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from storage.errors import CorruptChunk, StoreError
from storage.format.codecs import COMPRESSOR, Chain, UnknownCodecError, default_codecs, parse_chain

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
"""What JSON of another form than the one that is looked for comes to."""
DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32")


@dataclass(frozen=True)
class ArrayMeta:
    """What a reader needs of one sharded array; tuples run over every axis of the array.

    Args:
        shape, shard, chunk: Extents in voxels; shard is a multiple of chunk.
        chain: Codecs of an inner chunk.
        index_at_end: Where in the object the shard index lies.
        index_crc: Whether four bytes of CRC32C follow the index.
    """

    shape: tuple[int, ...]
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    chain: Chain
    index_at_end: bool = True
    index_crc: bool = True

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Inner chunks along each axis of a shard."""
        return tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))

    @cached_property
    def shards(self) -> tuple[int, ...]:
        """Shards along each axis of the array."""
        return tuple(math.ceil(n / s) for n, s in zip(self.shape, self.shard, strict=True))

    @cached_property
    def index_bytes(self) -> int:
        """Size of the shard index with its checksum."""
        return 16 * math.prod(self.grid) + (4 if self.index_crc else 0)

    def shard_key(self, at: Sequence[int]) -> str:
        """Key of a shard below the array's own key."""
        return "c/" + "/".join(str(i) for i in at)


def default_meta(shape: Sequence[int], shard: Sequence[int], chunk: Sequence[int], dtype: np.dtype[Any]) -> ArrayMeta:
    """The metadata that `array_document` describes, without reading them back."""
    return ArrayMeta(
        tuple(shape), tuple(shard), tuple(chunk), parse_chain(default_codecs(dtype), dtype, len(tuple(shape)))
    )


@lru_cache(maxsize=256)  # volumes of one data set often have one shape
def array_document(
    shape: tuple[int, ...],
    shard: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: np.dtype[Any],
    axes: str,
    compressor: str = COMPRESSOR,
) -> bytes:
    """`zarr.json` of a sharded array in our codecs; `axes` has one letter an axis. No reader needs the fill value."""
    inner = {
        "chunk_shape": list(chunk),
        "codecs": default_codecs(dtype, compressor),
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if dtype.kind == "f" else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
            "dimension_names": list(axes),
            "attributes": {},
        }
    )


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """`zarr.json` of a group."""
    return _json({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)})


def multiscales(name: str, axes: str, spacing_mm: Sequence[float], affine: Sequence[float]) -> list[dict[str, Any]]:
    """The OME-Zarr 0.5 `multiscales` entry of an image with one resolution.

    Args:
        axes: One letter an axis: `czyx` or `zyx`.
        spacing_mm: Along z, y, x.
        affine: Row-major 4x4, from (x, y, z, 1) voxel centres to RAS+ mm. Where its axes are those of the body, the
            first voxel's place becomes a translation; OME-Zarr 0.5 has no words for a rotation.
    """
    spacing = dict(zip("zyx", spacing_mm, strict=True))
    transforms = [{"type": "scale", "scale": [float(spacing.get(a, 1.0)) for a in axes]}]
    matrix = np.asarray(affine, dtype=np.float64).reshape(4, 4)
    if np.allclose(matrix[:3, :3], np.diag([spacing[a] for a in "xyz"]), rtol=1e-5, atol=1e-5 * min(spacing_mm)):
        origin = dict(zip("xyz", matrix[:3, 3].tolist(), strict=True))
        transforms.append({"type": "translation", "translation": [origin.get(a, 0.0) for a in axes]})
    return [
        {
            "name": name,
            "axes": [
                {"name": a, "type": "channel"} if a == "c" else {"name": a, "type": "space", "unit": "millimeter"}
                for a in axes
            ],
            "datasets": [{"path": "0", "coordinateTransformations": transforms}],
        }
    ]


def parse_array(document: bytes, thing: str) -> ArrayMeta:
    """Read `zarr.json` of a sharded array.

    Raises:
        CorruptChunk: not JSON, or not the metadata of an array.
        StoreError: an array this reader does not know how to read; names what it is.
    """
    try:
        data = json.loads(document)
        shape = tuple(int(n) for n in data["shape"])
        shard = tuple(int(n) for n in data["chunk_grid"]["configuration"]["chunk_shape"])
        type_name, codecs = data["data_type"], data["codecs"]
        encoding = data["chunk_key_encoding"]
        separator = (encoding.get("configuration") or {}).get("separator", "/")
        is_array = data["zarr_format"] == 3 and data["node_type"] == "array"
        regular = data["chunk_grid"]["name"] == "regular" and encoding["name"] == "default" and separator == "/"
        names = [str(c["name"]) for c in codecs]
    except MALFORMED as error:
        raise CorruptChunk(
            thing, expected="Zarr v3 array metadata", found=f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    if not is_array:
        raise CorruptChunk(thing, expected="Zarr v3 array metadata", found="a group or another version")
    if type_name not in DTYPES:
        raise StoreError(thing, expected=f"a data type among {', '.join(DTYPES)}", found=str(type_name))
    if not regular or names != ["sharding_indexed"]:
        raise StoreError(
            thing,
            expected="a regular grid with default '/' keys and the one codec sharding_indexed",
            found=f"grid {data['chunk_grid']['name']!r}, keys {encoding!r}, codecs {names}",
            remedy="write the array sharded, or ingest it from its files",
        )
    try:
        settings = codecs[0]["configuration"]
        index = [str(c["name"]) for c in settings["index_codecs"]]
        chunk = tuple(int(n) for n in settings["chunk_shape"])
        inner, index_at_end = settings["codecs"], settings.get("index_location", "end") == "end"
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CorruptChunk(thing, expected="the settings of sharding_indexed", found=reason) from error
    if index not in (["bytes"], ["bytes", "crc32c"]):
        raise StoreError(thing, expected="index codecs bytes, or bytes and crc32c", found=str(index))
    if len({len(shape), len(shard), len(chunk)}) != 1 or any(
        c < 1 or s < c or s % c for c, s in zip(chunk, shard, strict=True)
    ):
        raise CorruptChunk(thing, expected="shards that are multiples of chunks", found=f"{shard} and {chunk}")
    try:
        chain = parse_chain(inner, np.dtype(type_name), len(shape))
    except UnknownCodecError as error:
        raise StoreError(thing, expected="codecs this reader knows", found=str(error)) from error
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CorruptChunk(thing, expected="a list of codecs", found=reason) from error
    return ArrayMeta(shape, shard, chunk, chain, index_at_end, len(index) == 2)


def _json(data: Mapping[str, Any]) -> bytes:
    """What `json.dumps(data, indent=1, sort_keys=True, allow_nan=False)` gives, whose indenting encoder is slow."""
    return _text(dict(data), "\n ").encode()


def _text(value: Any, line: str) -> str:
    """A value as JSON; `line` is the line break with the indent of what lies inside it."""
    kind = type(value)
    if kind is str:
        return _string(value)
    if kind is int or (kind is float and math.isfinite(value)):
        return repr(value)
    if isinstance(value, dict):
        items = [f"{_string(key)}: {_text(value[key], line + ' ')}" for key in sorted(value)]
        return f"{{{line}{f',{line}'.join(items)}{line[:-1]}}}" if items else "{}"
    if isinstance(value, (list, tuple)):
        items = [_text(item, line + " ") for item in value]
        return f"[{line}{f',{line}'.join(items)}{line[:-1]}]" if items else "[]"
    return json.dumps(value, allow_nan=False)  # and what JSON does not know is refused


_string = json.encoder.encode_basestring_ascii
