"""What one process of a large job does, measured in a process of its own: `python -m jobs.bench.size.process JSON`.

JSON says `verb`: `publish` writes the manifest of a large data set, `read` is a rank that opens it and plans its steps.
Prints a line of JSON. Only manifests are read and written; no voxel is.
"""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.bench.measure import peak_mib
from storage.format.manifest import Manifest
from storage.format.records import DEFAULT_CODECS, VolumeRecord
from storage.intensity_stats import STATS_ORDER
from storage.objects import ByteStore, open_store
from storage.objects.tally import Tally, counted
from storage.stream.plan import Plan, StreamSpec, select

SHARE = 4
"""Samples of a batch, and lanes, of each rank."""
MIB = 2**20


def records(volumes: int) -> Iterator[VolumeRecord]:
    """Volumes with facts that compress as badly as those of real ones."""
    for i in range(volumes):
        digest = hashlib.sha256(str(i).encode()).hexdigest()
        draws = [int(digest[k : k + 4], 16) / 65536 for k in range(0, 24, 4)]
        yield VolumeRecord(
            volume_id=f"v{i:08d}-{digest[:8]}",
            subject=f"s{i // 3:08d}",
            study=f"{i % 3}",
            split="train" if i % 10 else "val",
            modality="CT",
            shape_DHW=(100 + int(100 * draws[0]), 512, 512),
            channels=1,
            spacing_mm=(1 + draws[1], 0.5 + draws[2], 0.5 + draws[2]),
            affine=tuple(draws[k % 6] * 300 for k in range(16)),
            orientation="LPS",
            dtype="int16",
            scale=1.0,
            offset=-1024.0,
            foreground_lo=(0, int(80 * draws[3]), int(80 * draws[4])),
            foreground_hi=(100, 430, 430),
            stats=(dict(zip(STATS_ORDER, (1000 * x for x in draws[: len(STATS_ORDER)]), strict=True)),),
            labels=(),
            source=f"{digest[:12]}/series-{i % 3}",
            source_sha256=digest,
            content_sha256=digest[::-1],
            reader="dicom/1",
            policy="native/1",
            notes=(),
            chunk_DHW=(32, 32, 32),
            shard_DHW=(128, 512, 512),
            codecs=DEFAULT_CODECS,
        )


def spec(nodes: int) -> StreamSpec:
    """The stream of a job of one rank a node."""
    return StreamSpec(seed=0, global_batch=SHARE * nodes, crop_DHW=(96, 96, 96), lanes=SHARE * nodes)


def publish(folder: str, volumes: int) -> dict[str, Any]:
    """Write the manifest; processor seconds, peak memory (MiB) and size (MiB)."""
    before = peak_mib()
    start = time.process_time()
    manifest = Manifest.from_records(records(volumes), {"name": "many"})
    fingerprint = manifest.write(open_store(Path(folder).as_uri()))
    seconds = time.process_time() - start
    size = max(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "fingerprint": fingerprint,
        "publish_s": seconds,
        "publish_mib": peak_mib() - before,
        "size_mib": size / MIB,
    }


def read(folder: str, nodes: list[int], steps: int, late: int) -> dict[str, Any]:
    """Open the manifest and plan steps as one rank of each number of nodes, then of `nodes[-1]` from step `late` on."""
    store = open_store(Path(folder).as_uri())
    before = _memory_mib()
    tally = Tally()
    start = time.process_time()
    manifest = Manifest.open(counted(store, tally))
    indices = select(manifest, spec(1))
    Plan(manifest, spec(1), indices)
    seconds, count = time.process_time() - start, tally.now()
    opened = {
        "open_s": seconds,
        "open_requests": count.requests,
        "open_mib": count.read_bytes / MIB,
        "open_memory_mib": _memory_mib() - before,
    }
    rows = [_planned(store, count, steps, 0) for count in nodes]
    largest = _memory_mib() - before
    resumed = _planned(store, nodes[-1], 1, late)
    late_row = {"resume_s": resumed["start_s"] + resumed["plan_ms"] / 1000}
    return {**opened, "memory_mib": largest, **late_row, "rows": rows}


def _planned(store: ByteStore, nodes: int, steps: int, first: int) -> dict[str, Any]:
    """What `steps` steps of the middle one of `nodes` ranks cost in processor time, requests and bytes."""
    tally = Tally()
    start = time.process_time()
    manifest = Manifest.open(counted(store, tally))
    stream = spec(nodes)
    plan = Plan(
        manifest, stream, select(manifest, stream), rank=nodes // 2, world=nodes, start=first * stream.global_batch
    )
    opened = tally.now()
    plan.places(plan.batch(0))  # the first one makes the keys of its epoch
    started = time.process_time()
    for k in range(steps):
        plan.places(plan.batch(k))
    ordered = time.process_time()
    for k in range(steps):
        plan.reads(k)
    planned, count = time.process_time(), tally.now()
    return {
        "nodes": nodes,
        "start_s": started - start,
        "order_ms": 1000 * (ordered - started) / steps,
        "plan_ms": 1000 * (planned - ordered) / steps,
        "requests_1000": 1000 * (count.requests - opened.requests) / steps,
        "mib_1000": 1000 * (count.read_bytes - opened.read_bytes) / steps / MIB,
    }


def same_sequence(folder: str, nodes: int, steps: int) -> dict[str, Any]:
    """Whether all ranks together read what one rank alone would; every rank, every crop."""
    manifest = Manifest.open(Path(folder).as_uri())
    stream = spec(nodes)
    indices = select(manifest, stream)
    alone = sorted(map(repr, _cuts(Plan(manifest, stream, indices), steps)))
    plans = (Plan(manifest, stream, indices, rank=rank, world=nodes) for rank in range(nodes))
    together = sorted(repr(cut) for plan in plans for cut in _cuts(plan, steps))
    return {"nodes": nodes, "volumes": len(indices), "crops": len(alone), "equal": together == alone}


def _cuts(plan: Plan, steps: int) -> list[Any]:
    """The crops of the first batches; what is read ahead for later ones depends on the memory of a rank."""
    until = plan.start + steps * plan.spec.global_batch
    return [cut for k in range(steps) for group in plan.reads(k) for cut in group if cut.sample < until]


def _memory_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / MIB


VERBS: dict[str, Callable[..., dict[str, Any]]] = {"publish": publish, "read": read, "same": same_sequence}


def main(task: Mapping[str, Any]) -> dict[str, Any]:
    """Run one verb with its arguments."""
    arguments = dict(task)
    return VERBS[arguments.pop("verb")](**arguments)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
