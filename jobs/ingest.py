"""Ingest: one task a volume, published by one atomic write at the end.

`python -m jobs.ingest CONFIG [key=value ...]` is the Ray job, with one Ray task a volume. `ingest` does the same from
any process: over Ray tasks where that process is in a cluster, over threads where it is not.
"""

import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import PurePath

import ray

from jobs.configs import IngestConfig
from jobs.driver import guarded, load
from jobs.on_ray.map import ray_map
from jobs.on_ray.room import require_room
from jobs.on_ray.session import connect
from jobs.output import Progress as Bar
from storage.datasets import simulated
from storage.errors import ConfigError, NotFound
from storage.format.manifest import Manifest
from storage.format.notes import note_kinds
from storage.ingest.items import Discovery
from storage.ingest.mapping import map_threads
from storage.ingest.pipeline import IngestReport, Progress, run
from storage.ingest.policy import IngestPolicy
from storage.ingest.publishing.quarantine import by_reason
from storage.ingest.readers.registry import format_of
from storage.ingest.work import unread

SIMULATED = "simulated"
MOST_LINES = 10
"""More orphans of one kind are counted, and a few named."""


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
        mapper = map_threads  # the folder is in this node's cache, where tasks on other nodes would not find it

        say("making SIMULATED subjects from a head template")
        source = str(simulated.ensure())
    bar: list[Bar] = []

    def progress(p: Progress) -> None:
        if not bar:
            bar.append(Bar("ingest", p.total, "volumes"))
        bar[0].update(p.done, f"{p.mb_per_s:.1f} MB/s")

    report = run(
        source,
        data,
        policy,
        mapper=mapper,
        progress=progress,
        discovered=lambda discovery: say("\n".join(outline(discovery))),
        refusals=lambda refused: say("\n".join(f"  refused: {line}" for line in by_reason(refused))),
        append=append,
    )
    say(describe(report, data))
    return report


def ensure_data(data: str, source: str | None) -> None:
    """Ingest `source` when the store at `data` has no manifest yet.

    Raises:
        NotFound: there is no manifest and no source to make it from.
    """
    try:
        Manifest.open(data)
    except NotFound as error:
        if source is None:
            raise NotFound(
                f"manifest of {data}",
                expected="an ingested store",
                found="none",
                remedy=f"ingest first: tomoscale data ingest FOLDER {data}",
            ) from error
        ingest(source, data)


def outline(discovery: Discovery) -> list[str]:
    """What a folder holds, before anything of it is read: whose the scans are, and what has no place."""
    items = discovery.items
    volumes: defaultdict[str, list[str]] = defaultdict(list)
    for item in items:
        volumes[item.subject].append("" if format_of(item.kind).hides_identity else item.name)
    labelled = sum(item.label is not None for item in items)
    lines = [f"{len(items)} volumes of {len(volumes)} subjects, {labelled} with a label map"]
    several = sorted((subject, names) for subject, names in volumes.items() if len(names) > 1)
    if several:
        examples = [f"{subject} ({', '.join(names[:3])})" for subject, names in several if names[0]][:3]
        lines.append(
            f"  subjects: {len(several)} with several volumes{': ' if examples else ''}{', '.join(examples)}; if that "
            "is wrong, set subject_pattern or subject_table"
        )
    lines += [f"  note: {note}" for note in discovery.notes]
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for orphan in discovery.orphans:
        kinds[re.sub(r" named [^;]*", " of its name", orphan.what)].append(str(orphan))
    for kind, orphans in kinds.items():
        examples = orphans if len(orphans) <= MOST_LINES else orphans[:3]
        lines += [f"  orphan: {orphan}" for orphan in examples]
        if len(orphans) > len(examples):
            lines.append(f"  orphan: and {len(orphans) - len(examples)} more: {kind}")
    if discovery.ignored:
        suffixes = Counter(PurePath(path).suffix.lower() or "no suffix" for path in discovery.ignored)
        counts = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
        lines.append(
            f"  ignored: {len(discovery.ignored)} files that no reader knows ({counts}), the first: "
            f"{discovery.ignored[0]}"
        )
    return lines


def describe(report: IngestReport, data: str) -> str:
    """What a run did, for a person."""
    lines = [
        f"published {report.published} volumes to {data} (manifest {report.manifest.fingerprint}):"
        f" {report.written} written, {report.skipped} already there, {report.bytes_in / 1e6:.1f} MB"
        f" in {report.seconds:.1f} s"
    ]
    lines += [f"  note: {warning}" for warning in report.warnings]
    volumes = zip(report.manifest.column("volume_id"), report.manifest.column("notes"), strict=True)
    lines += [f"  note: {kind}" for kind in note_kinds(volumes)]
    if report.quarantined:
        lines.append(f"  {len(report.quarantined)} refused in all; reasons are in quarantine.jsonl of the store")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Driver of the Ray job."""
    config = load(IngestConfig, argv, "jobs.ingest")
    if not os.path.isdir(config.source) and config.source != SIMULATED:
        raise ConfigError(
            f"source {config.source}",
            expected="a folder that the cluster's nodes can see",
            found="a file" if os.path.exists(config.source) else "no such folder",
            remedy="check the path; every volume below a folder is taken",
        )
    connect()
    require_room("a task of the ingest", "", cpus=1)
    ingest(config.source, config.data, config.policy, append=config.append, say=lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
