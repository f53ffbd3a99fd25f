"""What a folder holds and what an ingest would make of it, as text and as JSON. Imports no cluster."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import numpy as np

from jobs.output import duration, table
from ssl_core.config import Config
from storage.format.notes import note_kinds
from storage.ingest.deidentify import load_salt
from storage.ingest.items import Discovery
from storage.ingest.policy import IngestPolicy
from storage.ingest.preview import Preview, preview
from storage.ingest.publishing.quarantine import by_reason
from storage.ingest.readers.registry import FORMATS, format_of

MOST_LINES = 10
"""More orphans of one kind are counted, and a few named."""


class CheckConfig(Config):
    """What a check is told."""

    policy: IngestPolicy = IngestPolicy()


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


def facts(report: Preview) -> dict[str, Any]:
    """A preview as plain values, without identifiers that an ingest would hide."""
    volumes = report.volumes
    kinds = {form.name: [v for v in volumes if v.item.kind == form.name] for form in FORMATS}
    shapes = np.array([v.shape_CDHW for v in volumes]).reshape(-1, 4)
    spacings = np.array([v.spacing_mm for v in volumes]).reshape(-1, 3)
    notes = note_kinds((v.item.source, v.notes) for v in volumes)
    return {
        "volumes": len(volumes),
        "subjects": len({v.item.subject for v in volumes}),
        "labelled": sum(v.item.label is not None for v in volumes),
        "formats": {form.title: len(kinds[form.name]) for form in FORMATS if kinds[form.name]},
        "modalities": dict(Counter(v.modality or "not named" for v in volumes)),
        "channels": dict(Counter(int(c) for c in shapes[:, 0])),
        "shape D x H x W": span(shapes[:, 1:]),
        "spacing mm D x H x W": span(spacings),
        "splits": report.splits,
        "bytes of files": report.bytes_in,
        "bytes stored before compression": report.bytes_stored,
        "seconds": round(report.seconds(os.cpu_count() or 1), 1),
        "label maps not compared": report.unchecked_labels,
        "refused": by_reason(report.refused),
        "notes": [str(kind) for kind in notes],
        "problem": report.problem,
    }


def describe(report: Preview) -> str:
    """A preview for a person: what the folder holds, what would be stored, what would be refused, and the verdict."""
    values = facts(report)
    splits = "drawn by the pseudonyms of the store"
    if report.splits is not None:
        splits = ", ".join(f"{name} {count}" for name, count in report.splits.items())
    cores = os.cpu_count() or 1
    rows = [
        ("formats", ", ".join(f"{title} {count}" for title, count in values["formats"].items())),
        ("modalities", ", ".join(f"{name} {count}" for name, count in values["modalities"].items())),
        ("channels", ", ".join(f"{count} volumes of {n}" for n, count in values["channels"].items())),
        ("shape D x H x W", values["shape D x H x W"]),
        ("spacing mm D x H x W", values["spacing mm D x H x W"]),
        ("subjects of each split", splits),
        ("files", f"{report.bytes_in / 1e6:,.1f} MB"),
        ("stored before compression", f"at most {report.bytes_stored / 1e6:,.1f} MB"),
        (f"time on {cores} cores", f"about {duration(report.seconds(cores))}"),
    ]
    lines = outline(report.discovery)
    lines += ["", table(("an ingest would store", ""), rows)] if report.volumes else []
    lines += [f"  note: {note}" for note in values["notes"]]
    if report.unchecked_labels:
        lines.append(f"  note: {report.unchecked_labels} label maps are compared with their images when they are read")
    lines += [f"  would be refused: {line}" for line in values["refused"]]
    total = len(report.volumes) + len(report.refused)
    verdict = f"headers speak against {len(report.refused)} of {total} volumes; damaged voxels show when they are read"
    lines += ["", f"nothing would be published: {report.problem}" if report.problem else verdict]
    return "\n".join(lines)


def check(source: str, policy: IngestPolicy, progress: Callable[[int, int], None]) -> Preview:
    """See `storage.ingest.preview.preview`; the salt is the one in the environment, if there is one."""
    pseudonyms = None
    if os.environ.get("TOMOSCALE_SALT") or os.environ.get("TOMOSCALE_SALT_FILE"):
        pseudonyms = load_salt("")
    return preview(source, policy, pseudonyms=pseudonyms, progress=progress)


def span(values: Any) -> str:
    """The range and the median of each column."""
    if not len(values):
        return "-"
    low, middle, high = values.min(0), np.median(values, 0), values.max(0)
    return " x ".join(f"{a:g}..{c:g} (median {b:g})" for a, b, c in zip(low, middle, high, strict=True))
