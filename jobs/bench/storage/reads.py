"""`bench reads`: random crops, ours against its peers; same machine, data and list of crops, voxels compared first.

Cold means a new reader: nothing kept from earlier reads (on S3), or the files dropped from the page cache (locally).
One untimed crop opens connections. Warm means crops again that the same reader has read; a cache on the node is filled
with all of them first, untimed. What a server or a disk keeps
in its own memory is not under the benchmark's control. A slow reader is cut off after `cap_s` and rated on what it
read. Every round measures every reader under every condition, so that a drift of the machine meets all alike.
"""

import importlib
import importlib.util
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench import measure
from jobs.bench.storage import data as bench_data
from jobs.bench.storage.data import WRITERS, DataSet, Layouts, Writer
from jobs.bench.storage.peers import PEERS, CropStart, Peer, Reader
from storage.errors import StoreError
from storage.objects import join
from storage.testing.fault_proxy import ProxyProcess, delayed

COLUMNS = {
    "data": "data",
    "where": "from",
    "delay_ms": "+ms",
    "peer": "reader",
    "in_flight": "in flight",
    "state": "state",
    "crops_per_s": "crops/s",
    "cpu_ms": "cpu ms/crop",
    "requests": "requests/crop",
    "fetched_mb": "MB/crop",
    "crops": "crops",
    "note": "note",
}
RATIO_COLUMNS = {"data": "data", "what": "ratio", "value": "found", "target": "target", "met": "met"}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    volumes: int
    shape: tuple[int, int, int]
    crops: int
    rounds: int
    delays_ms: tuple[float, ...]
    cap_s: float
    real: int
    budget_s: float
    """No round begins that would end later than this after the start, judged by the last one; one is always done."""


QUICK = Size(2, (192, 256, 256), crops=12, rounds=5, delays_ms=(0, 20), cap_s=0.6, real=0, budget_s=140)
FULL = Size(8, (256, 320, 320), crops=64, rounds=5, delays_ms=(0, 5, 20), cap_s=1.2, real=20, budget_s=1500)


@dataclass
class _Row:
    """Measurements of one peer under one condition, one entry a round."""

    data: str
    where: str
    delay_ms: float
    peer: str
    in_flight: int
    state: str
    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)
    fetched_mb: list[float] = field(default_factory=list)
    crops: int = 0
    note: str = ""

    def result(self) -> dict[str, Any]:
        return {
            **{
                k: getattr(self, k)
                for k in ("data", "where", "delay_ms", "peer", "in_flight", "state", "crops", "note")
            },
            "crops_per_s": measure.spread(self.rates),
            "cpu_ms": statistics.median(self.cpu_ms),
            "requests": statistics.median(self.requests) if self.requests else None,
            "fetched_mb": statistics.median(self.fetched_mb) if self.fetched_mb else None,
            "rates": self.rates,
        }


def bench_reads(
    quick: bool = False,
    peers: Sequence[str] | None = None,
    s3_url: str | None = None,
    *,
    available: Sequence[Peer] = PEERS,
    writers: Mapping[str, tuple[Writer, str]] = WRITERS,
    size: Size | None = None,
    data: Sequence[DataSet] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure every peer and return a JSON-able result; `format_reads` prints it.

    Args:
        quick: A run of about two and a half minutes; else one of about 25.
        peers: Names among `available`; all by default. One whose package is missing becomes a row that says so.
        s3_url: Where to put the volumes meanwhile; endpoint and credentials come from the AWS environment. Without it
            only local reads are measured.
        available: Readers there are.
        writers: Layout name to its writer and the package it needs.
        size: Amounts other than those of `quick`.
        data: Volumes other than phantoms (and those of $TOMOSCALE_DATASETS in a full run).
        progress: Told what is measured next.

    Raises:
        ConfigError: an unknown peer, or an S3 store that cannot be reached.
        StoreError: a reader returned other voxels than were written; nothing is timed then.
    """
    size = size or (QUICK if quick else FULL)
    say = progress or (lambda _: None)
    names = measure.select(peers, [peer.name for peer in available])
    compared = [peer for peer in available if peer.name in names]
    began = time.perf_counter()
    facts = measure.machine()
    sets = (
        list(data) if data is not None else [bench_data.phantoms(size.volumes, size.shape), *bench_data.real(size.real)]
    )
    rows: list[_Row] = []
    skipped: dict[str, str] = {}
    sizes: dict[str, dict[str, int]] = {}
    for n, one in enumerate(sets):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
            url = None
            if s3_url is not None:
                stack.enter_context(measure.s3_environment(measure.s3_endpoint()))
                url = join(s3_url, f"bench-{uuid.uuid4().hex[:12]}")
            at = Layouts(one, Path(folder) / "layouts", url, writers)
            stack.callback(at.remove)
            run = _Run(at, size, Path(folder), say)
            usable = run.verified([p for p in compared if s3_url is not None or p.where == "local"], skipped)
            # Data sets share the time that is left equally.
            left = began + size.budget_s - time.perf_counter()
            rows += run.all(usable, skipped, time.perf_counter() + left / (len(sets) - n))
            sizes[one.name] = {layout: at.size(layout) for layout in sorted({p.layout for p in usable})}
    if s3_url is None:
        skipped.update({p.name: "no s3:// URL was given" for p in compared if p.where != "local"})
    return {
        "name": "reads",
        "machine": facts,
        "size": asdict(size),
        "data": {
            s.name: {
                "crop_DHW": s.crop_DHW,
                "volumes": len(s.volumes),
                "raw_bytes": sum(v.nbytes for v in s.volumes.values()),
                "layout_bytes": sizes[s.name],
            }
            for s in sets
        },
        "rows": [row.result() for row in rows],
        "ratios": ratios(rows),
        "skipped": skipped,
        "took_s": round(time.perf_counter() - began, 1),
    }


def format_reads(result: Mapping[str, Any]) -> str:
    """The result as two tables with the machine in front."""
    absent = [{"peer": name, "note": why} for name, why in result["skipped"].items()]
    parts = [measure.headline(result["machine"]), measure.table([*result["rows"], *absent], COLUMNS)]
    if result["ratios"]:
        parts.append(measure.table(result["ratios"], RATIO_COLUMNS))
    parts.append(f"took {result['took_s']} s; crops/s: median [least, greatest] of the rounds")
    return "\n\n".join(parts)


def ratios(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """Ours over a peer, round by round, for the comparisons that have a target."""
    out: list[dict[str, Any]] = []

    def find(data: str, peer: str, in_flight: int, state: str, delay: float) -> _Row | None:
        key = (data, peer, in_flight, state, delay)
        return next((r for r in rows if (r.data, r.peer, r.in_flight, r.state, r.delay_ms) == key), None)

    def add(data: str, what: str, one: _Row | None, other: _Row | None, target: float, key: str = "rates") -> None:
        if one is None or other is None or not getattr(one, key) or not getattr(other, key):
            return
        ratio = measure.spread([a / b for a, b in zip(getattr(one, key), getattr(other, key), strict=True)])
        met = ratio["median"] <= target if key == "requests" else ratio["median"] >= target
        out.append({"data": data, "what": what, "value": ratio, "target": target, "met": "yes" if met else "no"})

    for data in dict.fromkeys(row.data for row in rows):
        for delay in sorted({row.delay_ms for row in rows if row.where == "s3" and row.data == data}):
            where = f"S3 +{delay:g} ms"
            s3fs_target = 20.0 if delay >= 20 else 10.0
            slow = find(data, "zarr + s3fs", 1, "cold", delay)
            for flight in (1, 8):
                own = find(data, "tomoscale", flight, "cold", delay)
                add(data, f"{where}: ours {flight} in flight / zarr + s3fs one at a time", own, slow, s3fs_target)
                peer = find(data, "tensorstore", flight, "cold", delay)
                add(data, f"{where}: ours / tensorstore, {flight} in flight", own, peer, 1.0)
            one = find(data, "tomoscale", 1, "cold", delay)
            add(data, f"{where}: requests a crop, ours / zarr + s3fs", one, slow, 0.2, "requests")
        for flight, state in product((1, 8), ("cold", "warm")):
            own = find(data, "tomoscale, local", flight, state, 0)
            peer = find(data, "tensorstore, local", flight, state, 0)
            add(data, f"local disk, {state}: ours / tensorstore, {flight} in flight", own, peer, 1.0)
        for flight in (1, 8):
            warm = find(data, "tomoscale, node cache", flight, "warm", 0)
            blosc2 = find(data, "blosc2 b2nd", 1, "warm", 0)
            add(data, f"warm node cache, {flight} in flight / blosc2 b2nd, one at a time", warm, blosc2, 1.0)
            raw = find(data, "memmap", flight, "warm", 0)
            add(data, f"warm node cache / memmap, {flight} in flight", warm, raw, 0.6)
    return out


class _Run:
    """All measurements of one data set."""

    def __init__(self, at: Layouts, size: Size, folder: Path, say: Callable[[str], None]) -> None:
        self._at, self._size, self._folder, self._say = at, size, folder, say
        self._rows: dict[tuple[Any, ...], _Row] = {}

    def verified(self, peers: Sequence[Peer], skipped: dict[str, str]) -> list[Peer]:
        """The peers that are installed, each after it has returned the right voxels."""
        usable = []
        for peer in peers:
            if why := _absent(peer.package):
                skipped[peer.name] = f"{why}: {peer.install}"
                continue
            self._say(f"{self._at.data.name}: check {peer.name}")
            starts = self._at.data.crops(4, seed=999)
            for in_flight in peer.in_flight:
                with self._reader(peer, in_flight) as reader:
                    crops = reader.read(starts)
                    places = getattr(reader, "drawn", starts) if peer.own_crops else starts
                    for (name, start), voxels in zip(places, crops, strict=True):
                        if voxels.dtype != np.int16 or not np.array_equal(voxels, self._at.data.cut(name, start)):
                            raise StoreError(
                                f"{peer.name}: crop {start} of {name}", expected="the voxels that were written"
                            )
            usable.append(peer)
        return usable

    def all(self, peers: Sequence[Peer], skipped: dict[str, str], until: float) -> list[_Row]:
        """Round after round of every condition, as many as asked for or as end before `until` on the clock."""
        for k in range(self._size.rounds):
            began = time.perf_counter()
            self._say(f"{self._at.data.name}: round {k + 1} of up to {self._size.rounds}")
            for peer in _rotated([p for p in peers if p.where != "s3"], k):
                if peer.where == "local":
                    self._at.forget_pages(peer.layout)
                self._round(peer, k, 0, None)
            remote = _rotated([p for p in peers if p.where == "s3"], k)
            for delay in self._size.delays_ms if remote else ():
                with self._delayed(delay, skipped) as proxy:
                    if delay and proxy is None:
                        continue
                    for peer in remote:
                        self._round(peer, k, delay, proxy)
            if 2 * time.perf_counter() - began > until:
                break
        return sorted(self._rows.values(), key=lambda r: (("s3", "cache", "local").index(r.where), r.delay_ms))

    @contextmanager
    def _delayed(self, delay: float, skipped: dict[str, str]) -> Iterator[ProxyProcess | None]:
        endpoint = measure.s3_endpoint()
        if not delay:
            yield None
        elif endpoint is None or not endpoint.startswith("http://"):
            skipped[f"delay of {delay:g} ms"] = "the S3 endpoint is not plain http, so no proxy can stand before it"
            yield None
        else:
            with delayed(endpoint, delay / 1000) as proxy, measure.s3_environment(proxy.endpoint):
                yield proxy

    def _round(self, peer: Peer, k: int, delay: float, proxy: ProxyProcess | None) -> None:
        first, *starts = self._at.data.crops(self._size.crops + 1, seed=k)
        for in_flight in peer.in_flight:
            if peer.where == "local" and in_flight != peer.in_flight[0]:
                self._at.forget_pages(peer.layout)
            with self._reader(peer, in_flight) as reader:
                reader.read([first])
                cached = starts
                for state in peer.states:
                    if state == "cold" or peer.where != "s3":
                        row = self._row(peer, in_flight, state, delay)
                        done = self._pass(reader, starts if state == "cold" else cached, row, proxy)
                        if state == "cold" and peer.where == "cache":
                            reader.read(starts[done:])
                        elif state == "cold":
                            cached = starts[:done]

    def _pass(self, reader: Reader, starts: Sequence[CropStart], row: _Row, proxy: ProxyProcess | None) -> int:
        """How many crops were read until the time was up."""
        before = proxy.counts() if proxy else (0, 0)
        done, cpu, began = 0, time.process_time(), time.perf_counter()
        while done < len(starts) and (not done or time.perf_counter() - began < self._size.cap_s):
            done += len(reader.read(starts[done : done + row.in_flight]))
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        row.rates.append(done / took)
        row.cpu_ms.append(1000 * cpu / done)
        row.crops += done
        if proxy:
            requests, answered = proxy.counts()
            row.requests.append((requests - before[0]) / done)
            row.fetched_mb.append((answered - before[1]) / done / 1e6)
        return done

    def _row(self, peer: Peer, in_flight: int, state: str, delay: float) -> _Row:
        key = (peer.name, in_flight, state, delay)
        if key not in self._rows:
            self._rows[key] = _Row(self._at.data.name, peer.where, delay, peer.name, in_flight, state, note=peer.note)
        return self._rows[key]

    @contextmanager
    def _reader(self, peer: Peer, in_flight: int) -> Iterator[Reader]:
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            reader = peer.make(self._at, in_flight, Path(scratch))
            try:
                yield reader
            finally:
                reader.close()


def _absent(package: str) -> str:
    """Why a package cannot be used; empty where it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # installed, but not what it needs itself
        return f"{package} cannot be imported ({' '.join(str(error).split())[:100]})"
    return ""


def _rotated(peers: Sequence[Peer], k: int) -> list[Peer]:
    cut = k % max(1, len(peers))
    return [*peers[cut:], *peers[:cut]]
