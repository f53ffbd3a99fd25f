"""What a checkpoint costs the training beside it: the step that takes it, and those while it is uploaded.

Steps are a fixed number of matrix products. Copies, files and uploads are those of a job: `Uploads`, with the file
system that Ray is given; Ray itself is stood in for by a thread that calls back, as Ray Train's does.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs as pa_fs
import torch

from jobs.bench import measure
from jobs.on_ray.filesystem import storage_for
from ssl_core.train.checkpoint import Buffers, Snapshot
from storage.objects import join
from storage.testing.fault_proxy import delayed

TARGET_PERCENT = 2.0
COLUMNS = {
    "step": "step",
    "wall_s": "s",
    "percent": "of a step without %",
    "cpu_s": "processor s of the training thread",
    "cpu_percent": "of a step without, processor %",
    "count": "count",
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured.

    Attributes:
        state_bytes: Of a third as weights and two thirds as the optimizer's.
        tensors: Of the weights.
        step_s: Processor seconds of a step.
        rounds: Checkpoints; as many times the same number of steps without any.
        steps: Of a round.
        bytes_per_s: Of the way to the store.
    """

    state_bytes: int = 200 * 10**6
    tensors: int = 150
    step_s: float = 1.0
    rounds: int = 5
    steps: int = 8
    bytes_per_s: float = 50e6


QUICK = Size(state_bytes=3 * 10**6, tensors=6, step_s=0.01, rounds=2, steps=3)


@dataclass
class TrainAlone:
    """What `Uploads` asks of Ray Train, of one worker and without a cluster.

    Attributes:
        url: Prefix of the checkpoints.
        pool: Uploads them.
        under_way: The end of each upload.
    """

    url: str
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    under_way: list[Future[Any]] = field(default_factory=list)

    def report(self, _metrics: Any, *, checkpoint: Any, checkpoint_upload_fn: Any, **names: Any) -> None:
        """Upload the checkpoint, where there is one."""
        if checkpoint is None:
            return
        self.under_way.append(self.pool.submit(checkpoint_upload_fn, checkpoint, names["checkpoint_dir_name"]))

    def get_context(self) -> "TrainAlone":
        """As Ray Train's."""
        return self

    def get_storage(self) -> "TrainAlone":
        """As Ray Train's."""
        return self

    def persist_current_checkpoint(self, source: Any, name: str) -> Any:
        """Upload a folder, as Ray does it."""
        path, system = storage_for(self.url)
        system.create_dir(f"{path}/{name}")
        # As Ray copies: one file after the other, in parts of 64 MiB.
        pa_fs.copy_files(
            source.path,
            f"{path}/{name}",
            destination_filesystem=system,
            use_threads=False,
            chunk_size=64 << 20,
        )
        return source


def bench_checkpoint(size: Size, url: str | None, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; see the module.

    Args:
        size: How much.
        url: Prefix on S3, behind a way of `bytes_per_s`; None: a folder, without one.
        say: Takes a line of progress.
    """
    from jobs.on_ray.uploads import Uploads  # with Ray, which the page of the figures does without

    facts = measure.machine()
    state = _state(size)
    work = _calibrated(size.step_s)
    uploaded: list[tuple[float, int]] = []
    rows: dict[str, list[tuple[float, float]]] = {
        "without": [],
        "with the copy": [],
        "beside the upload": [],
        "the copy alone": [],
    }
    with _way(url, size.bytes_per_s) as target:
        train, buffers = TrainAlone(target), Buffers()
        uploads = Uploads(lambda: None, lambda seconds, count: uploaded.append((seconds, count)), train)
        for turn in range(-1, size.rounds):  # the first one makes the buffers and is not counted
            say(f"round {turn + 1} of {size.rounds}")
            without = [_timed(work) for _ in range(size.steps)]

            def report(turn: int = turn) -> None:
                uploads.report(f"step-{turn + 1:08d}", {}, lambda: Snapshot.of(state, {"step": turn + 1}, buffers))

            plain, copy = _timed(work), _timed(report)
            uploading: list[tuple[float, float]] = []
            while len(uploading) < size.steps and not train.under_way[-1].done():
                uploading.append(_timed(work))
            train.under_way[-1].result()
            if turn >= 0:
                rows["without"] += without
                rows["with the copy"].append((plain[0] + copy[0], plain[1] + copy[1]))
                rows["beside the upload"] += uploading
                rows["the copy alone"].append(copy)
        train.pool.shutdown()
    table = [_row(step, times, rows["without"]) for step, times in rows.items() if times]
    return {
        "rows": table,
        "uploads": {
            "seconds": measure.spread([seconds for seconds, _ in uploaded]),
            "bytes": uploaded[-1][1],
            "bytes_per_s": size.bytes_per_s if url else None,
        },
        "target_percent": TARGET_PERCENT,
        "machine": facts,
    }


def format_checkpoint(result: dict[str, Any]) -> str:
    """The table as text."""
    return "\n\n".join(
        [measure.headline(result["machine"]), measure.table(result["rows"], COLUMNS), uploads_text(result)]
    )


def uploads_text(result: Mapping[str, Any]) -> str:
    """What was uploaded, as a sentence."""
    uploads = result["uploads"]
    way = f"S3 at {uploads['bytes_per_s'] / 1e6:g} MB/s" if uploads["bytes_per_s"] else "a folder"
    return (
        f"A checkpoint has {uploads['bytes'] / 1e6:.0f} MB and took {uploads['seconds']['median']:.1f} s "
        f"to write and to send to {way}."
    )


def _row(step: str, times: list[tuple[float, float]], without: list[tuple[float, float]]) -> dict[str, Any]:
    wall, cpu = (measure.spread([pair[i] for pair in times]) for i in (0, 1))
    plain_wall, plain_cpu = (measure.spread([pair[i] for pair in without])["median"] for i in (0, 1))
    return {
        "step": step,
        "wall_s": wall,
        "percent": 100 * wall["median"] / plain_wall,
        "cpu_s": cpu,
        "cpu_percent": 100 * cpu["median"] / plain_cpu,
        "count": len(times),
    }


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and processor seconds of this thread, which other work on the machine does not change."""
    wall, cpu = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - wall, time.thread_time() - cpu


def _state(size: Size) -> dict[str, Any]:
    count = size.state_bytes // (3 * 4 * size.tensors)
    weights = {f"w{i}": torch.rand(count) for i in range(size.tensors)}
    moments = {name: {"exp_avg": torch.rand(count), "exp_avg_sq": torch.rand(count)} for name in weights}
    return {"method": weights, "optimizer": moments, "engine": {"step": 0}}


def _calibrated(step_s: float) -> Callable[[], None]:
    """Matrix products of about `step_s` processor seconds, always the same number."""
    one, two = torch.rand(256, 256), torch.rand(256, 256)
    for _ in range(3):
        one @ two
    start = time.thread_time()
    for _ in range(20):
        one @ two
    count = max(1, round(step_s / max((time.thread_time() - start) / 20, 1e-6)))

    def work() -> None:
        for _ in range(count):
            one @ two

    return work


@contextmanager
def _way(url: str | None, bytes_per_s: float) -> Iterator[str]:
    """Where checkpoints go: S3 behind a proxy that lets so many bytes a second through, or a folder."""
    if url is None:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            yield Path(folder).as_uri()
        return
    endpoint = str(measure.s3_endpoint())
    with delayed(endpoint, 0.0, bytes_per_s) as proxy, measure.s3_environment(proxy.endpoint):
        yield join(url, "checkpoints")
