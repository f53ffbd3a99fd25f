"""data check | ingest | append | superpixels | verify | show | fetch."""

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.cli.verbs.common import add_json, add_state, job_address, salt_here, use_stack
from jobs.output import Progress, emit, table, write_page
from storage.errors import ConfigError, RefusedInput

if TYPE_CHECKING:
    from ssl_core.config import C
    from storage.format.notes import NoteKind


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    data = verbs.add_parser("data", help="volumes: check, ingest, append, superpixels, verify, show, fetch")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="what an ingest would make of a folder, from names and headers")
    check.add_argument("source", help="folder of NIfTI, DICOM, NRRD, MHA, MGZ or Zarr volumes")
    check.add_argument("policy", nargs="*", default=[], metavar="key=value", help="ingest policy, as of `data ingest`")
    add_json(check)
    check.set_defaults(run=_check)
    for name, text in (
        ("ingest", "bring a folder of scans into a store; idempotent, and a killed run goes on"),
        ("append", "ingest, and keep what the store has already"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("source", help="folder of NIfTI, DICOM, NRRD, MHA or Zarr volumes, or `simulated`")
        action.add_argument("data", help="URL of the store, such as s3://volumes/NAME or file:///path")
        action.add_argument(
            "policy", nargs="*", default=[], metavar="key=value", help="ingest policy, such as spacing_mm=1.0"
        )
        action.add_argument("--address", metavar="URL", help="job server; the local stack's when it is up")
        action.add_argument("--local", action="store_true", help="in this process, without a cluster")
        add_state(action)
        action.set_defaults(run=_ingest, append=name == "append")
    regions = actions.add_parser(
        "superpixels", help="put super-pixels beside the images of a store; idempotent, and a killed run goes on"
    )
    regions.add_argument("data", help="URL of the store")
    regions.add_argument(
        "settings",
        nargs="*",
        default=[],
        metavar="key=value",
        help="how they are made, such as scale=50 or mode=volume",
    )
    regions.add_argument("--address", metavar="URL", help="job server; the local stack's when it is up")
    regions.add_argument("--local", action="store_true", help="in this process, without a cluster")
    add_state(regions)
    regions.set_defaults(run=_superpixels)
    verify = actions.add_parser("verify", help="read every chunk of a store again and check it")
    show = actions.add_parser("show", help="summarise a store")
    for action, run in ((verify, _verify), (show, _show)):
        action.add_argument("data", help="URL of the store")
        add_json(action)
        add_state(action)
        action.set_defaults(run=run)
    show.add_argument("--html", type=Path, metavar="FILE", help="also write a page with histograms and slices")
    fetch = actions.add_parser("fetch", help="download a public data set where the network allows")
    fetch.add_argument("dataset", choices=["hippocampus"])
    fetch.add_argument("folder", type=Path, help="where to put it")
    fetch.set_defaults(run=_fetch)


def _check(arguments: argparse.Namespace) -> int:
    from jobs import data_check

    policy = _configured(data_check.CheckConfig, {}, "policy", arguments.policy).policy
    bar: list[Progress] = []

    def progress(done: int, total: int) -> None:
        if not bar:
            bar.append(Progress("headers", total, "volumes"))
        bar[0].update(done)

    report = data_check.check(arguments.source, policy, progress)
    emit(data_check.facts(report), arguments.json, data_check.describe(report))
    return RefusedInput.exit_code if report.problem else 0


def _ingest(arguments: argparse.Namespace) -> int:
    from jobs.ingest_config import IngestConfig
    from jobs.ingestion import SIMULATED, ingest

    source = arguments.source if arguments.source == SIMULATED else str(Path(arguments.source).resolve())
    fields = {"source": source, "data": arguments.data, "append": arguments.append}
    config = _configured(IngestConfig, fields, "policy", arguments.policy)
    use_stack(arguments)
    if arguments.local or not _clustered(arguments) or _keeps_its_salt(arguments):
        ingest(config.source, config.data, config.policy, append=config.append)
        return 0
    from jobs import submit

    submit.run(job_address(arguments), "jobs.ingest", config, config.name, show=lambda line: print(line, flush=True))
    return 0


def _configured(kind: "type[C]", fields: dict[str, Any], group: str, settings: Sequence[str]) -> "C":
    """A job's configuration; what is said of wrong settings leaves their group out, as the command line does."""
    from ssl_core.config import load

    known = getattr(kind.model_fields[group].annotation, "model_fields", {})
    for item in settings:
        key = item.partition("=")[0]
        if key in kind.model_fields and key not in known:
            raise ConfigError(
                f"setting {key!r}",
                expected=f"one of the {group}",
                found="what the command itself says, by its verb or an argument",
                remedy="`tomoscale data --help` lists the verbs, and each verb's own --help its arguments",
            )
    try:
        return load(kind, fields, [f"{group}.{item}" for item in settings])
    except ConfigError as error:
        thing, remedy = (text.replace(f"{group}.", "") for text in (error.thing, error.remedy))
        raise ConfigError(thing, expected=error.expected, found=error.found, remedy=remedy) from error


def _superpixels(arguments: argparse.Namespace) -> int:
    from jobs import submit
    from jobs.configs import SuperpixelConfig
    from jobs.superpixels import compute

    config = _configured(SuperpixelConfig, {"data": arguments.data}, "superpixels", arguments.settings)
    use_stack(arguments)
    if arguments.local or not _clustered(arguments):
        compute(config.data, config.superpixels)
        return 0
    show = partial(print, flush=True)
    submit.run(job_address(arguments), "jobs.superpixels", config, config.name, show=show)
    return 0


def _clustered(arguments: argparse.Namespace) -> bool:
    from cluster import stack
    from jobs.cli.verbs.common import state_dir

    return bool(_elsewhere(arguments)) or stack.status(state_dir(arguments)).running


def _elsewhere(arguments: argparse.Namespace) -> str | None:
    """The cluster that was named; the local stack needs no name."""
    address: str | None = arguments.address or os.environ.get("TOMOSCALE_JOBS_ADDRESS")
    return address


def _keeps_its_salt(arguments: argparse.Namespace) -> bool:
    """Whether this process has a salt of the user's, which is a secret and so not sent with a job.

    Raises:
        ConfigError: the job would go to another cluster, which would take a salt of its own and say nothing.
    """
    salt = salt_here()
    if salt is None:
        return False
    if _elsewhere(arguments):
        raise ConfigError(
            f"${salt}",
            expected="the salt in the environment of the cluster's nodes, as no job carries a secret",
            found="one in this environment",
            remedy="set it on the nodes and not here, or use --local",
        )
    print(f"ingesting in this process, where ${salt} is: no job carries a secret", file=sys.stderr)
    return True


def _verify(arguments: argparse.Namespace) -> int:
    from storage.format.manifest import Manifest
    from storage.reading.verify import verify

    use_stack(arguments)
    bar: list[Progress] = []

    def progress(done: int, total: int, nbytes: int) -> None:
        if not bar:
            bar.append(Progress("verify", total, "volumes"))
        bar[0].update(done, f"{nbytes / 1e6:.1f} MB")

    report = verify(arguments.data, progress=progress)
    problems = [str(p) for p in report.problems]
    lines = [f"{report.volumes} volumes, {report.nbytes / 1e6:.1f} MB read, {len(problems)} problems", *problems]
    if report.strangers is None:
        lines.append("the store cannot list what it holds: volumes that no manifest names were not looked for")
    else:
        lines += [f"volumes/{name}: of no volume of this manifest" for name in report.strangers]
    notes = _notes(Manifest.open(arguments.data, report.fingerprint))
    lines += [f"note: {kind}" for kind in notes]
    facts = {"volumes": report.volumes, "bytes": report.nbytes, "problems": problems, "strangers": report.strangers}
    facts["notes"] = [asdict(kind) for kind in notes]
    emit(facts, arguments.json, "\n".join(lines))
    return 1 if problems else 0


def _show(arguments: argparse.Namespace) -> int:
    from storage.format.manifest import Manifest

    use_stack(arguments)
    manifest = Manifest.open(arguments.data)
    facts = _facts(manifest)
    rows = [
        (k, v if not isinstance(v, dict) else ", ".join(f"{n} {c}" for n, c in v.items())) for k, v in facts.items()
    ]
    notes = _notes(manifest)
    lines = [table(("fact", "value"), rows), *(f"note: {kind}" for kind in notes)]
    emit({**facts, "notes": [asdict(kind) for kind in notes]}, arguments.json, "\n".join(lines))
    if arguments.html is not None:
        from jobs.pages.store import render
        from storage.reading.volume_store import VolumeStore

        with VolumeStore(arguments.data, manifest) as store:
            write_page(arguments.html, render(store, facts))
        print(f"wrote {arguments.html}", file=sys.stderr)
    return 0


def _notes(manifest: Any) -> "tuple[NoteKind, ...]":
    from storage.format.notes import note_kinds

    return note_kinds(zip(manifest.column("volume_id"), manifest.column("notes"), strict=True))


def _facts(manifest: Any) -> dict[str, Any]:
    from jobs.data_check import span
    from storage.format.notes import remarks

    shapes, spacings = np.array(manifest.column("shape_DHW")), np.array(manifest.column("spacing_mm"))
    labels: Counter[str] = Counter()
    voxels: Counter[str] = Counter()
    derived: dict[str, list[int]] = defaultdict(list)
    recipes: dict[str, str] = {}
    for record in manifest.records():
        for label in record.labels:
            labels[label.name] += 1
            voxels.update({f"{label.name} {v}": n for v, n in zip(label.values, label.voxels, strict=True)})
        for item in record.derived:
            derived[item.name].append(item.regions)
            recipes[item.name] = item.made

    return {
        "manifest": manifest.fingerprint,
        "volumes": len(manifest),
        "subjects": len(manifest.subjects()),
        "splits": dict(Counter(manifest.column("split"))),
        "modalities": dict(Counter(m or "unknown" for m in manifest.column("modality"))),
        "orientations found": dict(Counter(manifest.column("orientation")).most_common(6)),
        "shape D x H x W": span(shapes),
        "spacing mm D x H x W": span(spacings),
        "stored dtypes": dict(Counter(manifest.column("dtype"))),
        "voxels": int(shapes.prod(1).sum()),
        "labelled volumes": dict(labels),
        "label voxels": dict(voxels.most_common(20)),
        "label names": dict(manifest.dataset.get("labels") or {}),
        "computed maps": {
            name: f"in {len(counts)} volumes, {int(np.median(counts))} regions (median), {recipes[name]}"
            for name, counts in sorted(derived.items())
        },
        "volumes with notes": sum(bool(remarks(n)) for n in manifest.column("notes")),
    }


def _fetch(arguments: argparse.Namespace) -> int:
    from storage.datasets.hippocampus import fetch_hippocampus

    bar: list[Progress] = []

    def progress(done: int, total: int) -> None:
        if not bar:
            bar.append(Progress("download", total, "bytes"))
        bar[0].update(done)

    print(fetch_hippocampus(arguments.folder, progress))
    return 0
