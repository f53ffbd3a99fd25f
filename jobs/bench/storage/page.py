"""Puts the tables of saved benchmark runs into a page: `python -m jobs.bench.storage.page PAGE FOLDER`.

FOLDER holds `reads.json`, `loader.json`, `ingest.json` and `layout.json`, as `tomoscale bench ... --out` writes them,
and `local.json` of a run of `reads` with local peers alone.
In the page, what stands between `<!-- table NAME -->` and `<!-- end -->` is replaced, so that no figure is typed.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.bench import measure
from jobs.bench.storage import ingest, layouts, loader, reads
from storage.errors import ConfigError

Result = Mapping[str, Any]
Tables = Mapping[str, tuple[str, Callable[[Result, str], str]]]
_BLOCK = re.compile(r"(<!-- table ([a-z-]+)(?:: ([^>]+?))? -->\n).*?(<!-- end -->)", re.S)
_S3 = ("delay_ms", "peer", "in_flight", "crops_per_s", "cpu_ms", "requests", "fetched_mb", "crops")
_DATA = {"name": "data", "crop_DHW": "crop", "volumes": "volumes", "raw_bytes": "raw bytes"}
_HERE = ("peer", "in_flight", "state", "crops_per_s", "cpu_ms", "crops", "note")


def _machine(result: Result) -> str:
    facts = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB memory, {facts['system']}, "
        f"Python {facts['python']}; load at the start {facts['load_1min']}; took {result['took_s']:.0f} s.\n\n"
        f"{versions}."
    )


def _reads(keys: tuple[str, ...], *where: str) -> Callable[[Result, str], str]:
    def make(result: Result, data: str) -> str:
        rows = [row for row in result["rows"] if row["data"] == data and row["where"] in where]
        return measure.table(rows, {key: reads.COLUMNS[key] for key in keys})

    return make


def _missed(result: Result) -> str:
    rows = [row for row in result.get("ratios", result.get("targets", ())) if row["met"] == "no"]
    columns = loader.TARGET_COLUMNS if "targets" in result else reads.RATIO_COLUMNS
    return measure.table(rows, {k: v for k, v in columns.items() if k != "met"}) if rows else "None."


TABLES: Tables = {
    "reads-machine": ("reads", lambda r, _: _machine(r)),
    "reads-data": (
        "reads",
        lambda r, _: measure.table([{"name": k, **v} for k, v in r["data"].items()], _DATA),
    ),
    "reads-ratios": ("reads", lambda r, _: measure.table(r["ratios"], reads.RATIO_COLUMNS)),
    "reads-missed": ("reads", lambda r, _: _missed(r)),
    "reads-s-three": ("reads", _reads(_S3, "s3")),
    "local-machine": ("local", lambda r, _: _machine(r)),
    "local-ratios": ("local", lambda r, _: measure.table(r["ratios"], reads.RATIO_COLUMNS)),
    "reads-here": ("reads", _reads(_HERE, "cache", "local")),
    "loader-missed": ("loader", lambda r, _: _missed(r)),
    "loader-machine": ("loader", lambda r, _: _machine(r)),
    "loader": ("loader", lambda r, _: measure.table(r["rows"], loader.COLUMNS)),
    "loader-targets": ("loader", lambda r, _: measure.table(r["targets"], loader.TARGET_COLUMNS)),
    "loader-memory": ("loader", lambda r, _: measure.table(r["memory"], loader.MEMORY_COLUMNS)),
    "loader-manifests": ("loader", lambda r, _: measure.table(r["manifests"], loader.MANIFEST_COLUMNS)),
    "ingest-missed": ("ingest", lambda r, _: _missed(r)),
    "ingest-machine": ("ingest", lambda r, _: _machine(r)),
    "ingest": ("ingest", lambda r, _: measure.table(r["rows"], ingest.COLUMNS)),
    "ingest-ratios": ("ingest", lambda r, _: measure.table(r["ratios"], ingest.RATIO_COLUMNS)),
    "layout-machine": ("layout", lambda r, _: _machine(r)),
    "layout": ("layout", lambda r, _: measure.table(r["rows"], layouts.COLUMNS)),
}


def fill(page: str, folder: Path, tables: Tables = TABLES) -> str:
    """The page with its tables made anew.

    Args:
        page: Its text.
        folder: Of the runs' JSON.
        tables: By name the run's file and what makes the table of its result and of the block's argument.

    Raises:
        ConfigError: a block names no table, or its run is not in the folder.
    """
    runs: dict[str, Result] = {}

    def block(match: re.Match[str]) -> str:
        begin, name, argument, end = match.groups()
        if name not in tables:
            raise ConfigError(f"table {name!r}", expected=f"one of {', '.join(sorted(tables))}", found=name)
        run, make = tables[name]
        if run not in runs:
            path = folder / f"{run}.json"
            if not path.is_file():
                raise ConfigError(str(path), expected=f"the JSON of `tomoscale bench {run} --out`", found="none")
            runs[run] = json.loads(path.read_text(encoding="utf-8"))
        return f"{begin}\n{make(runs[run], argument or '')}\n\n{end}"

    return _BLOCK.sub(block, page)


def main(page: str, folder: str) -> None:
    """Rewrite the page in place."""
    path = Path(page)
    path.write_text(fill(path.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])
