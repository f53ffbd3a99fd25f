"""`bench loader`: does the stream keep a trainer fed? Data wait beside a step that only sleeps, throughput, memory, and
the cost of a manifest of a million volumes.
"""

import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench import measure
from jobs.bench.storage import data as bench_data
from jobs.bench.storage.data import DataSet, Layouts
from storage.format.manifest import Manifest
from storage.format.records import VolumeRecord
from storage.intensity_stats import STATS_ORDER
from storage.objects import join, open_store
from storage.reading.node_cache import NodeCache
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream
from storage.stream.plan import Plan, StreamSpec, select
from storage.testing.fault_proxy import delayed

COLUMNS = {
    "where": "from",
    "delay_ms": "+ms",
    "crops_per_visit": "crops a visit",
    "wait_percent": "data wait %",
    "first_batch_s": "first batch s",
    "crops_per_s": "crops/s without a step",
    "cpu_ms": "cpu ms/crop",
}
MEMORY_COLUMNS = {"crops": "crops", "rss_mib": "resident MiB"}
TARGET_COLUMNS = {"what": "figure", "value": "found", "target": "target", "met": "met"}
MOMENTS, FEWEST = 20, 8
"""At which memory is looked at, and as many at least, however late it is."""
WAIT_PERCENT, SLOPE_MIB, OPEN_S = 3.0, 1.0, 2.0
"""Targets: data wait, growth of resident memory over 1000 crops, opening of the largest manifest."""
MANIFEST_COLUMNS = {
    "volumes": "volumes",
    "mib": "MiB",
    "open_s": "open s",
    "order_ms": "order of the first batch, ms",
    "plan_ms": "its crops, facts read, ms",
}
REQUESTS_IN_FLIGHT = 32


@dataclass(frozen=True)
class Size:
    """How much is measured. The batch is 8 and the fake step sleeps `step_s`.

    Attributes:
        budget_s: Seconds from the start after which the memory run ends and before which every condition has to,
            judged by the longest one before it; what does not begin for that is named as skipped.
    """

    volumes: int
    shape: tuple[int, int, int]
    steps: int
    flat_out: int
    memory_crops: int
    delays_ms: tuple[float, ...]
    manifests: tuple[int, ...]
    batch: int = 8
    step_s: float = 0.1
    budget_s: float = 600


QUICK = Size(3, (192, 256, 256), 60, 25, 1000, (0, 20), (1_000, 10_000))
FULL = Size(8, (256, 320, 320), 300, 60, 10_000, (0, 20), (1_000, 1_000_000))


def bench_loader(
    quick: bool = False,
    s3_url: str | None = None,
    *,
    size: Size | None = None,
    data: DataSet | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Stream crops on two cores from the disk, the node's cache and (with `s3_url`) S3; `format_loader` prints it.

    Args:
        quick: A run of about two minutes; else one of about ten.
        s3_url: Where to put the volumes meanwhile; endpoint and credentials come from the AWS environment.
        size: Amounts other than those of `quick`.
        data: Volumes other than phantoms.
        progress: Told what is measured next.
    """
    size = size or (QUICK if quick else FULL)
    say = progress or (lambda _: None)
    facts, began = measure.machine(), time.perf_counter()
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    say("make volumes")
    volumes = data or bench_data.phantoms(size.volumes, size.shape)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
        stack.enter_context(measure.on_cores(2))  # which is what a GPU's data worker often gets
        if s3_url is not None:
            stack.enter_context(measure.s3_environment(measure.s3_endpoint()))
        url = None if s3_url is None else join(s3_url, f"bench-{uuid.uuid4().hex[:12]}")
        at = Layouts(volumes, Path(folder) / "layouts", url)
        stack.callback(at.remove)
        spec = StreamSpec(seed=1, global_batch=size.batch, crop_DHW=volumes.crop_DHW)
        local = at.folder("tomoscale").as_uri()
        until, longest = began + size.budget_s, 0.0
        for where, delay, cuts in _conditions(size, url is not None):
            name = f"{where} +{delay:g} ms, {cuts} crops a visit"
            start = time.perf_counter()
            if start + longest > until:
                skipped.append(name)
                continue
            say(name)
            one, source = replace(spec, crops_per_visit=cuts), local if where == "local" else at.url("tomoscale")
            cache = NodeCache(Path(folder) / f"cache-{cuts}", 8 << 30) if where == "cache" else None
            with _behind(delay):
                if cache is not None:  # filled first
                    _fed(source, one, replace(size, step_s=0.0, flat_out=1), cache)
                rows.append({"where": where, "delay_ms": delay} | _fed(source, one, size, cache))
            longest = max(longest, time.perf_counter() - start)
        say(f"memory over {size.memory_crops} crops")
        memory = _memory(local if url is None else at.url("tomoscale"), spec, size, until)
    say("manifests")
    manifests = [_manifest(n) for n in size.manifests]
    slope = slope_mib(memory)
    return {
        "name": "loader",
        "machine": facts,
        "size": asdict(size),
        "rows": rows,
        "skipped": skipped,
        "memory": memory,
        "memory_slope_mib_per_1000_crops": slope,
        "manifests": manifests,
        "targets": _targets(rows, slope, manifests),
        "took_s": round(time.perf_counter() - began, 1),
    }


def format_loader(result: Mapping[str, Any]) -> str:
    """The result as tables with the machine in front."""
    tables = [
        measure.table(result["rows"], COLUMNS),
        measure.table(result["memory"], MEMORY_COLUMNS),
        f"resident memory: {result['memory_slope_mib_per_1000_crops']:+.2f} MiB over 1000 crops, from a quarter on",
        measure.table(result["manifests"], MANIFEST_COLUMNS),
        measure.table(result["targets"], TARGET_COLUMNS),
    ]
    step = 1000 * result["size"]["step_s"]
    note = f"batch {result['size']['batch']}, fake step {step:g} ms, on two cores; took {result['took_s']} s"
    if result["skipped"]:
        note += f"; for want of time without {', '.join(result['skipped'])}"
    return "\n\n".join([measure.headline(result["machine"]), *tables, note])


def _conditions(size: Size, s3: bool) -> list[tuple[str, float, int]]:
    """Where from, milliseconds of delay, and crops a visit of every row."""
    remote = [*(("s3", delay) for delay in size.delays_ms), ("cache", 0.0)] if s3 else []
    return [(where, delay, cuts) for cuts in (4, 1) for where, delay in [("local", 0.0), *remote]]


def slope_mib(memory: Sequence[Mapping[str, float]]) -> float:
    """Growth of resident memory in MiB over 1000 crops: least squares after the first quarter, which fills buffers."""
    late = [row for row in memory if row["crops"] >= memory[-1]["crops"] / 4]
    crops, mib = np.array([[row["crops"], row["rss_mib"]] for row in late], np.float64).T
    return float(1000 * np.polyfit(crops, mib, 1)[0])


def _targets(
    rows: Sequence[Mapping[str, Any]], slope: float, manifests: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    figures: list[tuple[str, float, float]] = []
    for row in rows:
        where = f"{row['where']} +{row['delay_ms']:g} ms, {row['crops_per_visit']} crops a visit"
        figures.append((f"data wait, {where}, %", row["wait_percent"], WAIT_PERCENT))
    figures.append(("resident memory over 1000 crops, MiB", slope, SLOPE_MIB))
    small, large = manifests[0], manifests[-1]
    figures.append((f"open a manifest of {large['volumes']:,}, s", large["open_s"], OPEN_S))
    times = f"{large['volumes']:,} / {small['volumes']:,} volumes"
    figures.append((f"order of the first batch, {times}", large["order_ms"] / small["order_ms"], 1.0))
    figures.append((f"its crops with their facts, {times}", large["plan_ms"] / small["plan_ms"], 1.0))
    return [
        {"what": what, "value": value, "target": f"at most {limit:g}", "met": "yes" if value <= limit else "no"}
        for what, value, limit in figures
    ]


def _fed(url: str, spec: StreamSpec, size: Size, cache: NodeCache | None) -> dict[str, Any]:
    """Wait beside the fake step, then throughput without one, each from a fresh store."""
    with VolumeStore(url, cache=cache, threads=REQUESTS_IN_FLIGHT) as store, CropStream(store, spec) as stream:
        first = next(stream).wait_s
        began, waited = time.perf_counter(), 0.0
        for _ in range(size.steps):
            time.sleep(size.step_s)
            waited += next(stream).wait_s
        share = waited / (time.perf_counter() - began)
    with VolumeStore(url, cache=cache, threads=REQUESTS_IN_FLIGHT) as store, CropStream(store, spec) as stream:
        next(stream)
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(size.flat_out):
            next(stream)
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
    crops = size.flat_out * spec.global_batch
    return {
        "crops_per_visit": spec.crops_per_visit,
        "wait_percent": 100 * share,
        "first_batch_s": first,
        "crops_per_s": crops / took,
        "cpu_ms": 1000 * cpu / crops,
    }


def _memory(url: str, spec: StreamSpec, size: Size, until: float) -> list[dict[str, Any]]:
    """Resident memory of this process at some moments of a long stream, which ends early when time is up."""
    rows: list[dict[str, Any]] = []
    batches = size.memory_crops // spec.global_batch

    def note(k: int) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        rows.append({"crops": k * spec.global_batch, "rss_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)})

    with VolumeStore(url) as store, CropStream(store, spec) as stream:
        for k in range(batches):
            if k % max(1, batches // MOMENTS) == 0:
                note(k)
            if len(rows) > FEWEST and time.perf_counter() > until:
                return rows
            next(stream)
        note(batches)
    return rows


def _manifest(volumes: int) -> dict[str, Any]:
    """Open a manifest of that many volumes from a file, and order its first batch."""
    record = VolumeRecord(
        volume_id="", subject="", study="", split="train", modality="CT", shape_DHW=(256, 320, 320), channels=1,
        spacing_mm=(1.0, 1.0, 1.0), affine=(1.0,) * 16, orientation="RAS", dtype="int16", scale=1.0, offset=0.0,
        foreground_lo=(0, 0, 0), foreground_hi=(256, 320, 320), stats=(dict.fromkeys(STATS_ORDER, 1.0),), labels=(),
        source="", source_sha256="", content_sha256="", reader="", policy="", notes=(), chunk_DHW=(32, 32, 32),
        shard_DHW=(256, 320, 320),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        store = open_store(Path(folder).as_uri())
        records = (replace(record, volume_id=f"v{i:08d}", subject=f"s{i // 3:07d}") for i in range(volumes))
        fingerprint = Manifest.from_records(records, {"name": "many"}).write(store)
        began = time.perf_counter()
        manifest = Manifest.open(store, fingerprint)
        opened = time.perf_counter()
        spec = StreamSpec(seed=0, global_batch=8, crop_DHW=(96, 96, 96))
        indices = select(manifest, spec)
        ordered = []
        for seed in range(20):  # the best of some, since a single one takes microseconds
            start = time.perf_counter()
            Plan(manifest, replace(spec, seed=seed), indices).places([0, 1, 2, 3, 4, 5, 6, 7])
            ordered.append(time.perf_counter() - start)
        planned = []
        for seed in range(10):  # each with a manifest that has read no row yet
            manifest = Manifest.open(store, fingerprint)
            start = time.perf_counter()
            Plan(manifest, replace(spec, seed=seed), indices).reads(0)
            planned.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "volumes": volumes,
        "mib": round(size / 2**20, 2),
        "open_s": opened - began,
        "order_ms": 1000 * min(ordered),
        "plan_ms": 1000 * min(planned),
    }


@contextmanager
def _behind(delay_ms: float) -> Iterator[None]:
    """The S3 environment, behind a proxy where there is a delay."""
    if not delay_ms:
        yield
        return
    with delayed(str(measure.s3_endpoint()), delay_ms / 1000) as proxy, measure.s3_environment(proxy.endpoint):
        yield
