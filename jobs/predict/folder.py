"""`python -m jobs.predict MODEL IN OUT` writes a mask for every volume of a folder or a URL, one Ray task a volume.

A classifier or a regressor writes a row a volume below `rows`, which are joined to `predictions.csv` in the end.
Folders are mounted by every node; of URLs see `jobs.predict.objects`. The model is downloaded once, into OUT, so that
all masks are of one version of it, also where its alias moves meanwhile and where the job is sent again. A mask that is
in OUT already is left. A configuration (`config.yaml`) may stand in place of the three.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from jobs.on_ray.map import ray_map
from jobs.on_ray.session import connect
from jobs.predict import objects
from jobs.predict.config import PredictJobConfig
from ssl_core.config import load
from storage.errors import ConfigError, RefusedInput, TomoscaleError

SUFFIXES = (".nii", ".nii.gz")
IN_FLIGHT = 1024  # tasks that wait for a node or have one; more than a cluster has
_LAST_CHARACTERS = 400
Predict = Callable[[Path], str]
V = TypeVar("V")


def find(scans: Path, masks: Path) -> list[Path]:
    """The volumes of `scans`, by name.

    Raises:
        ConfigError: a folder is missing, both are one, or the first holds no volume.
    """
    for folder in (scans, masks):
        if not folder.is_dir():
            raise ConfigError(str(folder), expected="a folder", found="none", remedy="mount it on every node")
    if scans.resolve() == masks.resolve():  # every volume would pass for its own mask
        raise ConfigError(
            str(masks), expected="another folder than that of the volumes", found="the same", remedy="name another"
        )
    volumes = sorted(path for path in scans.iterdir() if path.name.endswith(SUFFIXES) and path.is_file())
    if not volumes:
        raise ConfigError(
            str(scans), expected=f"volumes ({', '.join(SUFFIXES)})", found="none", remedy="name the folder with them"
        )
    return volumes


def pin(model: str, masks: Path) -> Path:
    """The bundle of `model` in the folder `masks`, downloaded the first time.

    Raises:
        ConfigError: the folder has masks of another model.
        TomoscaleError: the download failed.
    """
    bundle, note = masks / "model", masks / "model.txt"
    if bundle.exists() and note.read_text(encoding="utf-8") != model:
        raise ConfigError(
            str(masks),
            expected=f"masks of {model}",
            found=f"those of {note.read_text(encoding='utf-8')}",
            remedy="name another folder",
        )
    if not bundle.exists():
        note.write_text(model, encoding="utf-8")
        problem = _tomoscale("models", "pull", model, str(bundle))  # which puts it in place whole
        if problem:
            raise TomoscaleError(
                f"model {model}", expected="a download", found=problem, remedy="remove the cause, send the job again"
            )
    return bundle


def mask_of(bundle: Path, result: Callable[[Path], Path], options: Sequence[str] = ()) -> Predict:
    """What makes the mask or the row of one volume; it returns an empty string, or why there is none.

    Args:
        bundle: The model.
        result: Where that of a volume goes.
        options: Of `tomoscale predict`.
    """

    def predict(volume: Path) -> str:
        return _tomoscale("predict", str(bundle), str(volume), str(result(volume)), *options)

    return predict


def _url(place: str) -> str:
    return place if "://" in place else Path(place).absolute().as_uri()


def _tomoscale(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "jobs.cli.main", *words], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip()[-_LAST_CHARACTERS:] or f"exit code {done.returncode}"


def on_cluster(predict: Callable[[V], str], volumes: Iterable[V], cpus: int, gpus: int) -> Iterator[tuple[V, str]]:
    """Predict on the Ray cluster that the environment names; each volume with its reason when it is done."""
    connect()
    return ray_map(
        lambda volume: (volume, predict(volume)),
        volumes,
        cpus=cpus,
        gpus=gpus,
        in_flight=IN_FLIGHT,
        lost=lambda volume, how: (volume, f"its process was ended each time, {how}"),
    )


def report(results: Iterable[tuple[str, str]], total: int, what: str) -> int:
    """Print each result; 0 when every volume has its mask or row (`what`), else 3."""
    without = []
    for number, (name, reason) in enumerate(results, 1):
        print(f"{number} of {total}: {name}{f': {reason}' if reason else ''}")
        without += [name] if reason else []
    if without:
        print(f"{len(without)} of {total} volumes have no {what}: {', '.join(sorted(without))}", file=sys.stderr)
    return RefusedInput.exit_code if without else 0


def main(words: Sequence[str]) -> int:
    """The exit code: 0 done, 1 no cluster, 2 a wrong argument, 3 where volumes have no mask."""
    parser = argparse.ArgumentParser(prog="python -m jobs.predict", description=__doc__)
    parser.add_argument("model", help="model URI, such as models:/NAME@ALIAS")
    parser.add_argument("scans", help="folder or URL of .nii and .nii.gz, or URL of a store")
    parser.add_argument("masks", help="folder or URL to write to; a URL where the scans have one")
    parser.add_argument("--split", help="of a store: only this split")
    parser.add_argument("--force", action="store_true", help="predict what is far from all that the model learned from")
    parser.add_argument("--cpus", type=int, default=4, help="of a task (default: 4)")
    parser.add_argument("--gpus", type=int, default=0, help="of a task (default: 0)")
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        words = load(PredictJobConfig, Path(words[0])).words()
    arguments = parser.parse_args(words)
    try:
        options = ("--force",) if arguments.force else ()
        size = (arguments.cpus, arguments.gpus)
        if "://" in arguments.scans or "://" in arguments.masks:
            return _of_urls(arguments, options, size)
        if arguments.split is not None:
            raise ConfigError("--split", expected="the URL of a store", found=arguments.scans, remedy="leave it out")
        return _of_folders(arguments, options, size)
    except TomoscaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _of_urls(arguments: argparse.Namespace, options: Sequence[str], size: tuple[int, int]) -> int:
    scans, masks = (_url(place) for place in (arguments.scans, arguments.masks))
    every = objects.find(scans, masks, arguments.split)
    names = [scan.name for scan in every]
    bundle = objects.pin(arguments.model, masks, _tomoscale)
    if rows := objects.writes_rows(bundle):
        every = [replace(scan, name=objects.row_of(scan.name)) for scan in every]
    remote = objects.due(every, masks)
    make = objects.mask_of(bundle, scans, masks, options, _tomoscale)
    results = ((s.name, why) for s, why in on_cluster(make, remote, *size))
    return _ended(results, len(remote), names if rows else [], masks)


def _of_folders(arguments: argparse.Namespace, options: Sequence[str], size: tuple[int, int]) -> int:
    folder = Path(arguments.masks)
    every = find(Path(arguments.scans), folder)
    bundle = pin(arguments.model, folder)
    if rows := objects.writes_rows(bundle.absolute().as_uri()):
        (folder / objects.ROWS).mkdir(exist_ok=True)

    def result(volume: Path) -> Path:
        return folder / (objects.row_of(volume.name) if rows else volume.name)

    volumes = [path for path in every if not result(path).exists()]
    results = ((v.name, why) for v, why in on_cluster(mask_of(bundle, result, options), volumes, *size))
    return _ended(results, len(volumes), [path.name for path in every] if rows else [], _url(arguments.masks))


def _ended(results: Iterable[tuple[str, str]], total: int, rows: Sequence[str], masks: str) -> int:
    """Report, and join the rows of these scans where there are rows."""
    code = report(results, total, "row" if rows else "mask")
    if rows:
        print(f"{objects.join_rows(rows, masks)} of {len(rows)} volumes in {objects.TABLE}")
    return code
