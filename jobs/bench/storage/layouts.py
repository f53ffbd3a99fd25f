"""`bench layout`: what chunk edge, codec and shuffle cost, on CT-like phantoms and real CT and MR.

Every candidate compresses the same volumes. A crop at a random place meets chunks of edge k that hold (c + k - 1)^3
voxels on average; what it fetches and decodes follows from that, the measured ratio and the measured speed of one
thread. The time a crop takes on a link is that of its bytes plus that of decoding them on the cores of the bench,
whichever is longer, since the two overlap.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
from numcodecs import blosc

from jobs.bench import measure
from jobs.bench.storage import data as bench_data
from jobs.bench.storage.data import Triple, Volume
from storage.format.codecs import COMPRESSOR, COMPRESSORS

COLUMNS = {
    "data": "data",
    "chunk": "chunk",
    "codec": "codec",
    "ratio": "ratio",
    "encode_mb_per_s": "encode MB/s",
    "decode_mb_per_s": "decode MB/s",
    "chunks": "chunks/crop",
    "fetch_mb": "MB/crop",
    "decode_ms": "decode ms/crop",
    "at_1_gbit": "crops/s, 1 Gbit/s",
    "at_10_gbit": "crops/s, 10 Gbit/s",
    "chosen": "chosen",
}
SHUFFLES = {"bit": blosc.BITSHUFFLE, "byte": blosc.SHUFFLE, "no": blosc.NOSHUFFLE}
CODECS: tuple[tuple[str, int, str], ...] = (
    ("lz4", 5, "bit"),
    ("lz4", 5, "byte"),
    ("zstd", 1, "bit"),
    ("zstd", 3, "bit"),
    ("zstd", 3, "byte"),
)
CODECS += (("zstd", 9, "bit"), ("zlib", 4, "byte"))
CORES = 2
"""Cores that decode, in the last columns."""


@dataclass(frozen=True)
class Size:
    """How much is measured; `edges` are of cubic chunks, cut to the volume where it is thinner."""

    phantom: Triple
    real: int
    edges: tuple[int, ...]
    repeats: int
    most_chunks: int


QUICK = Size((96, 192, 192), real=2, edges=(24, 32, 48), repeats=2, most_chunks=150)
FULL = Size((192, 256, 256), real=6, edges=(16, 24, 32, 40, 48, 64), repeats=5, most_chunks=600)


def bench_layout(
    quick: bool = False,
    *,
    size: Size | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure the candidates and return a JSON-able result; `format_layout` prints it.

    Args:
        quick: A run of about a minute.
        size: Amounts other than those of `quick`.
        progress: Told what is measured next.
    """
    size = size or (QUICK if quick else FULL)
    say = progress or (lambda _: None)
    facts, began = measure.machine(), time.perf_counter()
    sets = [bench_data.phantoms(1, size.phantom), *bench_data.real(size.real)]
    before, blosc.use_threads = blosc.use_threads, False
    rows = []
    try:
        for one in sets:
            volumes = list(one.volumes.values())
            for edge in size.edges:
                chunk = _chunk(edge, one.crop_DHW, volumes)
                pieces = _pieces(volumes, chunk, size.most_chunks)
                for codec in CODECS if edge == 32 else CODECS[:4]:
                    say(f"{one.name}: {'x'.join(map(str, chunk))}, {codec[0]} {codec[1]}, {codec[2]} shuffle")
                    rows.append({"data": one.name} | _measure(pieces, chunk, one.crop_DHW, codec, size.repeats, edge))
    finally:
        blosc.use_threads = before
    return {
        "name": "layout",
        "machine": facts,
        "size": asdict(size),
        "rows": rows,
        "took_s": round(time.perf_counter() - began, 1),
    }


def format_layout(result: Mapping[str, Any]) -> str:
    """The result as a table with the machine in front."""
    note = f"one thread; crops/s with {CORES} cores decoding; took {result['took_s']} s"
    return "\n\n".join([measure.headline(result["machine"]), measure.table(result["rows"], COLUMNS), note])


def _chunk(edge: int, crop: Triple, volumes: Sequence[Volume]) -> Triple:
    """The edge scaled by the crop's, so that thin crops get thin chunks, and no longer than the thinnest volume."""
    thinnest = [min(v.shape[a] for v in volumes) for a in range(3)]
    d, h, w = (min(n, max(1, round(edge * c / 96))) for c, n in zip(crop, thinnest, strict=True))
    return d, h, w


def _pieces(volumes: Sequence[Volume], chunk: Triple, most: int) -> list[Volume]:
    """Whole chunks of the volumes, evenly thinned to at most `most`."""
    places = [
        (v, origin)
        for v in volumes
        for origin in np.ndindex(*(n // c for n, c in zip(v.shape, chunk, strict=True)))
    ]  # fmt: skip
    step = max(1, len(places) // most)
    return [
        np.ascontiguousarray(v[tuple(slice(o * c, o * c + c) for o, c in zip(origin, chunk, strict=True))])
        for v, origin in places[::step]
    ]


def _measure(
    pieces: Sequence[Volume], chunk: Triple, crop: Triple, codec: tuple[str, int, str], repeats: int, edge: int
) -> dict[str, Any]:
    name, level, shuffle = codec
    raw = sum(piece.nbytes for piece in pieces)
    buffer = bytearray(pieces[0].nbytes)
    encoding, decoding = [], []  # processor time: one thread that never waits
    for _ in range(repeats):
        began = time.process_time()
        packed = [bytes(blosc.compress(p.reshape(-1), name.encode(), level, SHUFFLES[shuffle])) for p in pieces]
        encoding.append(time.process_time() - began)
        began = time.process_time()
        for one in packed:
            blosc.decompress(one, buffer)
        decoding.append(time.process_time() - began)
    ratio = raw / sum(map(len, packed))
    met = prod(c + k - 1 for c, k in zip(crop, chunk, strict=True)) * pieces[0].itemsize
    fetch, decode_s = met / ratio, met / (raw / min(decoding))
    return {
        "chunk": "x".join(map(str, chunk)),
        "codec": f"{name} {level}, {shuffle} shuffle",
        "ratio": ratio,
        "encode_mb_per_s": raw / min(encoding) / 1e6,
        "decode_mb_per_s": raw / min(decoding) / 1e6,
        "chunks": met / pieces[0].nbytes,
        "fetch_mb": fetch / 1e6,
        "decode_ms": 1000 * decode_s,
        "at_1_gbit": 1 / max(fetch / 125e6, decode_s / CORES),
        "at_10_gbit": 1 / max(fetch / 1250e6, decode_s / CORES),
        "chosen": "yes" if edge == 32 and codec == (COMPRESSOR, COMPRESSORS[COMPRESSOR], "bit") else "",
    }
