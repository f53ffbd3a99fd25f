"""Masks of scans on object storage, written to object storage, a scan a task.

A scan is a NIfTI file below a URL, or a volume of a store. Its mask is one object, which is there whole or not at all,
so that a job that is sent again predicts what has none. The model is copied once below the masks. A classifier or a
regressor writes a row in place of a mask, and all rows are joined to one table in the end.
"""

import csv
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.errors import ConfigError, TomoscaleError
from storage.format.manifest import POINTER, Manifest
from storage.objects import ByteStore, join, open_store

SUFFIXES = (".nii", ".nii.gz")
MODEL, NOTE, CARD = "model", "model.txt", "bundle.json"
ROWS, TABLE = "rows", "predictions.csv"
Tomoscale = Callable[..., str]
"""Runs `tomoscale WORDS`; returns an empty string, or why it failed."""


@dataclass(frozen=True)
class RemoteScan:
    """A scan on object storage.

    Attributes:
        name: Of its mask or row, a key below the URL of the masks.
        key: Of the file below the URL of the scans; empty of a volume in a store.
        volume: Of a volume in a store; empty of a file.
    """

    name: str
    key: str = ""
    volume: str = ""


def find(scans: str, masks: str, split: str | None = None) -> list[RemoteScan]:
    """All scans, by name.

    Args:
        scans: URL of files, or of a store.
        masks: URL.
        split: Of a store: only this split.

    Raises:
        ConfigError: both are one place, or nothing is there to predict.
    """
    source, target = open_store(scans), open_store(masks)
    if source.url.rstrip("/") == target.url.rstrip("/"):
        raise ConfigError(
            masks, expected="another place than that of the scans", found="the same", remedy="name another"
        )
    if source.exists(POINTER):
        manifest = Manifest.open(source)
        ids = [manifest.record(index).volume_id for index in manifest.select(split=split).tolist()]
        every = [RemoteScan(f"{name.replace('/', '__')}.nii.gz", volume=name) for name in ids]
    elif split is None:
        every = [RemoteScan(key, key) for key in source.list() if key.endswith(SUFFIXES)]
    else:
        raise ConfigError("--split", expected="a store", found=scans, remedy="leave it out")
    if not every:
        raise ConfigError(
            scans, expected=f"files ({', '.join(SUFFIXES)}) or volumes of a store", found="none", remedy="check the URL"
        )
    return sorted(every, key=lambda scan: scan.name)


def due(every: Sequence[RemoteScan], masks: str) -> list[RemoteScan]:
    """Those of the scans that have no result yet."""
    done = set(open_store(masks).list())
    return [scan for scan in every if scan.name not in done]


def row_of(name: str) -> str:
    """Key of the row of a scan whose mask would be called so."""
    return f"{ROWS}/{name}.csv"


def writes_rows(bundle: str) -> bool:
    """Whether a model's result is a row, and not a mask.

    Args:
        bundle: URL of the model.
    """
    return json.loads(open_store(bundle).get(CARD))["kind"] in ("classifier", "regressor")


def join_rows(names: Sequence[str], masks: str) -> int:
    """Write the rows that there are to `predictions.csv`, which is replaced; returns how many there are.

    Args:
        names: Of all scans, in the order of the table; a scan is called so in its first column.
        masks: URL.
    """
    store = open_store(masks)
    done = set(store.list())
    lines: list[list[str]] = []
    for name in names:
        if row_of(name) in done:
            header, row = csv.reader(io.StringIO(store.get(row_of(name)).decode("utf-8"), newline=""))
            lines += [[name, *row[1:]]] if lines else [header, [name, *row[1:]]]
    if lines:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(lines)
        store.put(TABLE, text.getvalue().encode("utf-8"))
    return max(0, len(lines) - 1)


def pin(model: str, masks: str, tomoscale: Tomoscale) -> str:
    """URL of the bundle below the masks, copied there the first time.

    Raises:
        ConfigError: the place has masks of another model.
        TomoscaleError: the download failed.
    """
    store = open_store(masks)
    if not store.put(NOTE, model.encode(), if_absent=True) and (note := store.get(NOTE).decode()) != model:
        raise ConfigError(masks, expected=f"masks of {model}", found=f"those of {note}", remedy="name another place")
    if not store.exists(f"{MODEL}/{CARD}"):
        with tempfile.TemporaryDirectory(prefix="tomoscale-predict-") as folder:
            bundle = Path(folder) / "bundle"
            if problem := tomoscale("models", "pull", model, str(bundle)):
                raise TomoscaleError(
                    f"model {model}",
                    expected="a download",
                    found=problem,
                    remedy="remove the cause, send the job again",
                )
            files = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == CARD):  # which is written last: then all is there
                store.put(f"{MODEL}/{path.relative_to(bundle).as_posix()}", path.read_bytes())
    return join(masks, MODEL)


def mask_of(
    bundle: str, scans: str, masks: str, options: Sequence[str], tomoscale: Tomoscale
) -> Callable[[RemoteScan], str]:
    """What makes and stores the mask or the row of one scan; it returns an empty string, or why there is none.

    Args:
        bundle: URL of the model.
        scans: URL of files, or of a store.
        masks: URL.
        options: Of `tomoscale predict`.
        tomoscale: See `Tomoscale`.
    """

    def predict(scan: RemoteScan) -> str:
        with tempfile.TemporaryDirectory(prefix="tomoscale-predict-") as folder:
            target = Path(folder) / f"mask-{Path(scan.name).name}"
            try:
                place, more = _place(open_store(scans), scan, Path(folder)), list(options)
                if scan.volume:
                    place, more = scans, [*more, "--volume", scan.volume]
                if problem := tomoscale("predict", bundle, place, str(target), *more):
                    return problem
                open_store(masks).put(scan.name, target.read_bytes())
            except (TomoscaleError, OSError) as error:
                return str(error)
        return ""

    return predict


def _place(store: ByteStore, scan: RemoteScan, folder: Path) -> str:
    """A copy of a scan that is a file."""
    path = folder / Path(scan.key).name
    if scan.key:
        path.write_bytes(store.get(scan.key))
    return str(path)
