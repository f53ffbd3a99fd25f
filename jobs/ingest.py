"""Ingest: one task a volume, published by one atomic write at the end.

`python -m jobs.ingest CONFIG [key=value ...]` is the Ray job, with one Ray task a volume. `ingest` does the same from
any process: over Ray tasks where that process is in a cluster, over threads where it is not.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import ray
import ray.exceptions

from jobs import driver as entry
from jobs.configs import IngestConfig
from jobs.on_ray.session import result_of
from jobs.output import Progress as Bar
from storage.errors import ConfigError
from storage.ingest.pipeline import IngestReport, Progress, map_threads, run, unread
from storage.ingest.policy import IngestPolicy

W = TypeVar("W")
R = TypeVar("R")

SIMULATED = "simulated"
RETRIES = 3
"""How often a task is tried again after its worker was killed."""


def ray_map(
    function: Callable[[W], R],
    items: Iterable[W],
    *,
    in_flight: int = 16,
    lost: Callable[[W, str], R] | None = None,
) -> Iterator[R]:
    """Map over Ray tasks with bounded back-pressure, yielding results as they finish.

    A task whose worker dies is run again by Ray; an error of ours is raised here as it was there.

    Args:
        function: Runs in the tasks.
        items: What to map.
        in_flight: Tasks at a time.
        lost: The result for an item that killed its worker each time, and how; without it that is an error.
    """
    task: Any = ray.remote(max_retries=RETRIES)(function)
    running: dict[Any, W] = {}

    def one_done() -> R:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        item = running.pop(done)
        try:
            result: R = result_of(done)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            if lost is None:
                raise
            memory = isinstance(error, ray.exceptions.OutOfMemoryError)
            return lost(item, "by Ray, for want of memory" if memory else "by the system or by a fault in a library")
        return result

    for item in items:
        running[task.remote(item)] = item
        if len(running) >= in_flight:
            yield one_done()
    while running:
        yield one_done()


def ingest(
    source: str,
    data: str,
    policy: IngestPolicy | None = None,
    *,
    append: bool = False,
    say: Callable[[str], None] = print,
) -> IngestReport:
    """Ingest a folder, or the simulated cohort, and say what happened.

    Args:
        source: Folder of volumes, or `simulated`.
        data: URL of the store.
        policy: See `storage.ingest.policy`.
        append: Keep published volumes that `source` does not hold.
        say: Hears the summary, orphans and refusals by name.
    """
    mapper = partial(ray_map, lost=unread) if ray.is_initialized() else map_threads
    if source == SIMULATED:
        from storage.datasets import simulated as cohort

        mapper = map_threads  # the folder is in this node's cache, where tasks on other nodes would not find it

        say("making SIMULATED subjects from a head template")
        source = str(cohort.ensure())
    bar: list[Bar] = []

    def progress(p: Progress) -> None:
        if not bar:
            bar.append(Bar("ingest", p.total, "volumes"))
        bar[0].update(p.done, f"{p.mb_per_s:.1f} MB/s")

    report = run(source, data, policy, mapper=mapper, progress=progress, append=append)
    say(describe(report, data))
    return report


def describe(report: IngestReport, data: str) -> str:
    """What a run did, for a person."""
    lines = [
        f"published {report.published} volumes to {data} (manifest {report.manifest.fingerprint}):"
        f" {report.written} written, {report.skipped} already there, {report.bytes_in / 1e6:.1f} MB"
        f" in {report.seconds:.1f} s"
    ]
    lines += [f"  orphan: {orphan}" for orphan in report.orphans]
    if report.ignored:
        lines.append(f"  ignored: {len(report.ignored)} files that no reader knows, the first: {report.ignored[0]}")
    lines += [f"  refused: {refused}" for refused in report.quarantined]
    lines += [f"  note: {warning}" for warning in report.warnings]
    if report.quarantined:
        lines.append(f"  {len(report.quarantined)} refused in all; reasons are in quarantine.jsonl of the store")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Driver of the Ray job."""
    config = entry.load(IngestConfig, argv, "jobs.ingest")
    from jobs.on_ray.session import connect

    if not os.path.isdir(config.source) and config.source != SIMULATED:
        raise ConfigError(
            f"source {config.source}",
            expected="a folder that the cluster's nodes can see",
            found="a file" if os.path.exists(config.source) else "no such folder",
            remedy="check the path; every volume below a folder is taken",
        )
    connect()
    ingest(config.source, config.data, config.policy, append=config.append, say=lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
