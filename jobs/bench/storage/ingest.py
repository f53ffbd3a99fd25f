"""`bench ingest`: from files to what training reads, ours beside the first pass of MONAI's `PersistentDataset`.

Ours reads, turns to RAS+, resamples, measures, compresses, checks and publishes; MONAI reads, turns, resamples and
saves float32. Both read the same files from the page cache and write to the same disk. Every measurement is a process
of its own, kept on as many cores as it may use, that times its volumes after one untimed volume, which imports what is
needed: with one core one volume follows another, with all of them ours takes a thread a core and MONAI a process.
Processor time is told beside the clock's: on a machine that does other things it is the steadier of the two.

MB are those of the voxels in the files, uncompressed: 1e6 bytes.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from jobs.bench import measure
from jobs.bench.storage import data as bench_data
from storage.errors import StoreError

OURS = "tomoscale"
COLUMNS = {
    "data": "data",
    "spacing": "spacing",
    "cores": "cores",
    "tool": "tool",
    "mb_per_s": "MB/s",
    "mb_per_cpu_s": "MB a CPU second",
    "volumes_per_s": "volumes/s",
    "stored_mb": "written MB",
    "note": "note",
}
RATIO_COLUMNS = {"data": "data", "what": "ratio", "value": "found", "target": "target", "met": "met"}
_NIBABEL: Any = nibabel


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        phantoms: CT-like volumes, (160, 256, 256) unless `shape` says otherwise, of 1.5 x 0.8 x 0.8 mm.
        real: Most real volumes of a folder.
        rounds: Measurements of each tool, one after another in turn.
        cores: How many a tool may use; one and all there are, where not given.
        budget_s: No round begins that would end later than this after the start, judged by the last one; one is always
            done.
    """

    phantoms: int
    real: int
    rounds: int
    shape: tuple[int, int, int] = (160, 256, 256)
    cores: tuple[int, ...] = ()
    budget_s: float = 600


QUICK = Size(phantoms=3, real=24, rounds=2, budget_s=170)
FULL = Size(phantoms=4, real=260, rounds=5)


@dataclass(frozen=True)
class Tool:
    """One way of ingesting.

    Attributes:
        name: As in the table.
        module: Run as `python -m module JOB`, where JOB is a JSON object with `files`, `target` (a new folder),
            `spacing_mm` (null: as it is) and `cores`; its last line is `{"seconds": ..., "cpu_s": ...}`.
        note: What a reader of the table has to know.
    """

    name: str
    module: str
    note: str = ""


@dataclass(frozen=True)
class Files:
    """Source files with the resampling that is measured on them."""

    name: str
    paths: tuple[Path, ...]
    spacing_mm: float
    voxel_bytes: int


def bench_ingest(
    quick: bool = False,
    *,
    tools: Sequence[Tool] = (),
    size: Size | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure ours and `tools` and return a JSON-able result; `format_ingest` prints it.

    Args:
        quick: A run of about three minutes; else one of about ten.
        tools: Peers.
        size: Amounts other than those of `quick`.
        progress: Told what is measured next.

    Raises:
        StoreError: a tool ended without a result; its last words are in the message.
    """
    size = size or (QUICK if quick else FULL)
    say = progress or (lambda _: None)
    facts, began = measure.machine(), time.perf_counter()
    numbers = size.cores or tuple(sorted({1, len(os.sched_getaffinity(0))}))
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        say("make volumes")
        sets = [_phantoms(size, Path(folder)), *_real(size.real)]
        cases = [(files, spacing, n) for files in sets for spacing in (None, files.spacing_mm) for n in numbers]
        for k in range(size.rounds):
            round_began = time.perf_counter()
            for files, spacing, cores in cases:
                for tool in _turned([Tool(OURS, __name__, "with statistics, checks, checksums"), *tools], k):
                    say(f"{files.name}, {_spacing(spacing)}, {cores} cores: {tool.name}, round {k + 1}")
                    took, cpu_s, stored = _run(tool, files, spacing, cores, Path(folder))
                    key = (files.name, _spacing(spacing), cores, tool.name)
                    row = rows.setdefault(key, _row(key, tool, files))
                    row["seconds"].append(took)
                    row["cpu_s"].append(cpu_s)
                    row["stored_mb"] = stored / 1e6
            now = time.perf_counter()
            if now + (now - round_began) > began + size.budget_s:
                break
    for row in rows.values():
        rates = [row["raw_mb"] / took for took in row["seconds"]]
        row["mb_per_s"] = measure.spread(rates)
        row["mb_per_cpu_s"] = measure.spread([row["raw_mb"] / cpu_s for cpu_s in row["cpu_s"]])
        row["volumes_per_s"] = row["volumes"] / statistics.median(row["seconds"])
    return {
        "name": "ingest",
        "machine": facts,
        "size": asdict(size),
        "rows": list(rows.values()),
        "ratios": _ratios(list(rows.values())),
        "took_s": round(time.perf_counter() - began, 1),
    }


def format_ingest(result: Mapping[str, Any]) -> str:
    """The result as two tables with the machine in front."""
    parts = [measure.headline(result["machine"]), measure.table(result["rows"], COLUMNS)]
    if result["ratios"]:
        parts.append(measure.table(result["ratios"], RATIO_COLUMNS))
    parts.append(f"took {result['took_s']} s; MB/s: median [least, greatest] of the rounds")
    return "\n\n".join(parts)


def _row(key: tuple[Any, ...], tool: Tool, files: Files) -> dict[str, Any]:
    return {
        **dict(zip(("data", "spacing", "cores", "tool"), key, strict=True)),
        "volumes": len(files.paths),
        "raw_mb": files.voxel_bytes / 1e6,
        "seconds": [],
        "cpu_s": [],
        "note": tool.note,
    }


def _ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ours over each peer, round by round."""
    out = []
    own = {(r["data"], r["spacing"], r["cores"]): r for r in rows if r["tool"] == OURS}
    for row in rows:
        if row["tool"] == OURS:
            continue
        baseline = own[row["data"], row["spacing"], row["cores"]]
        for key, unit in (("seconds", "MB/s"), ("cpu_s", "MB a CPU second")):
            ratio = measure.spread([b / a for a, b in zip(baseline[key], row[key], strict=True)])
            what = f"{unit}, {row['spacing']}, {row['cores']} cores: ours / {row['tool']}"
            met = "yes" if ratio["median"] >= 1 else "no"
            out.append({"data": row["data"], "what": what, "value": ratio, "target": 1.0, "met": met})
    return out


def _run(tool: Tool, files: Files, spacing: float | None, cores: int, folder: Path) -> tuple[float, float, int]:
    """Seconds of the clock and of processors, and bytes left behind."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        target = Path(scratch) / "out"
        job = {"files": [str(p) for p in files.paths], "target": str(target), "spacing_mm": spacing, "cores": cores}
        command = [sys.executable, "-m", tool.module, json.dumps(job)]
        with measure.on_cores(cores):  # a child inherits them
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        try:
            report = json.loads(done.stdout.strip().splitlines()[-1])
            took, cpu_s = float(report["seconds"]), float(report["cpu_s"])
        except (IndexError, KeyError, TypeError, ValueError) as error:
            words = " ".join((done.stderr or done.stdout).split())[-500:]
            raise StoreError(f"bench ingest: {tool.name}", expected="a result", found=words or "no output") from error
        return took, cpu_s, sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _phantoms(size: Size, folder: Path) -> Files:
    data = bench_data.phantoms(size.phantoms, size.shape)
    target = folder / "phantoms"
    target.mkdir()
    paths = []
    for name, volume in data.volumes.items():
        paths.append(target / f"{name}.nii.gz")
        # As scanners' exports come: left-posterior axes and slices thicker than pixels.
        image = _NIBABEL.Nifti1Image(volume.transpose(2, 1, 0), np.diag([-0.8, -0.8, 1.5, 1.0]))
        _NIBABEL.save(image, paths[-1])
    shape = "x".join(map(str, size.shape[::-1]))
    return Files(f"phantom CT {shape}", tuple(paths), 1.0, sum(v.nbytes for v in data.volumes.values()))


def _real(limit: int) -> list[Files]:
    """Real volumes of the folder that $TOMOSCALE_DATASETS names, those that are there."""
    root = os.environ.get("TOMOSCALE_DATASETS", "")
    sets = []
    folders = (
        ("hippocampus MR 36x50x35", "msd_hippocampus/images", 1.25),
        ("abdominal MR 256x256x36", "chaos_t2/images", 1.5),
    )
    for name, folder, spacing in folders:
        paths = tuple(sorted(Path(root).glob(f"{folder}/*.nii.gz")))[:limit] if root else ()
        if paths:
            sets.append(Files(name, paths, spacing, sum(_voxel_bytes(path) for path in paths)))
    return sets


def _voxel_bytes(path: Path) -> int:
    header = _NIBABEL.load(path).header
    return int(np.prod(header.get_data_shape())) * int(header.get_data_dtype().itemsize)


def _turned(tools: list[Tool], k: int) -> list[Tool]:
    cut = k % len(tools)
    return [*tools[cut:], *tools[:cut]]


def _spacing(spacing: float | None) -> str:
    return "as found" if spacing is None else f"to {spacing:g} mm"


def timed(work: Callable[[Mapping[str, Any]], None], job: Mapping[str, Any]) -> dict[str, float]:
    """Do a job and tell what it took, after one of its files elsewhere; for tools."""
    with tempfile.TemporaryDirectory(dir=Path(job["target"]).parent) as aside:
        work({**job, "files": job["files"][:1], "target": f"{aside}/out"})
    before, began = _cpu_s(), time.perf_counter()
    work(job)
    return {"seconds": time.perf_counter() - began, "cpu_s": _cpu_s() - before}


def _cpu_s() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)  # os.times counts in steps of 10 ms


def ours(job: Mapping[str, Any]) -> None:
    """Ingest the files of a job."""
    from storage.ingest import pipeline as ingest
    from storage.ingest.mapping import map_serial, map_threads
    from storage.ingest.policy import IngestPolicy

    source = Path(job["target"]) / "source"
    source.mkdir(parents=True)
    for path in job["files"]:
        (source / Path(path).name).symlink_to(path)
    spacing = "native" if job["spacing_mm"] is None else float(job["spacing_mm"])
    policy = IngestPolicy(spacing_mm=spacing, min_subjects=1)
    mapper = map_serial if job["cores"] == 1 else map_threads
    report = ingest.run(str(source), (Path(job["target"]) / "store").as_uri(), policy, mapper=mapper)
    if report.published != len(job["files"]):
        raise StoreError("bench ingest", expected=f"{len(job['files'])} volumes", found=f"{report.published}")
    for link in source.iterdir():
        link.unlink()


if __name__ == "__main__":
    print(json.dumps(timed(ours, json.loads(sys.argv[1]))))
