"""An ingest in any process: its progress, what is said of it, and the simulated cohort. Imports no cluster."""

from collections.abc import Callable, Sequence

from jobs.data_check import outline
from jobs.output import Progress as Bar
from storage.errors import NotFound
from storage.format.manifest import Manifest
from storage.format.notes import note_kinds
from storage.ingest.mapping import map_threads
from storage.ingest.pipeline import IngestReport, Mapper, Progress, run
from storage.ingest.policy import IngestPolicy
from storage.ingest.publishing.claims import HIDDEN
from storage.ingest.publishing.quarantine import Quarantined, by_reason, key_file
from storage.objects import open_store

SIMULATED = "simulated"


def ingest(
    source: str,
    data: str,
    policy: IngestPolicy | None = None,
    *,
    append: bool = False,
    mapper: Mapper = map_threads,
    say: Callable[[str], None] = print,
) -> IngestReport:
    """Ingest a folder, or the simulated cohort, and say what happened.

    Args:
        source: Folder of volumes, or `simulated`.
        data: URL of the store.
        policy: See `storage.ingest.policy`.
        append: Keep published volumes that `source` does not hold.
        mapper: How tasks are run, as of `storage.ingest.pipeline.run`.
        say: Hears the summary, orphans and refusals by name.
    """
    if source == SIMULATED:
        from storage.datasets import simulated  # what it needs of nibabel takes seconds to import

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
        refusals=lambda refused: say("\n".join(refusals(refused, data))),
        append=append,
    )
    say(describe(report, data))
    return report


def ensure_data(data: str, source: str | None, mapper: Mapper) -> None:
    """Ingest `source` when the store at `data` has no manifest yet.

    Args:
        data: URL of the store.
        source: Folder of volumes, or `simulated`.
        mapper: How tasks are run.

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
        ingest(source, data, mapper=mapper)


def refusals(refused: Sequence[Quarantined], data: str) -> list[str]:
    """What was refused, by reason, and where it is said which files these are."""
    lines = [f"  refused: {line}" for line in by_reason(refused)]
    if any(one.stored.startswith(HIDDEN) for one in refused):
        path = key_file(open_store(data).url)
        where = "in" if path.is_file() else "not known, for this file could not be written:"
        lines.append(f"  refused: the store names no path; digests and paths are {where} {path}, on this machine only")
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
