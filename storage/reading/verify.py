"""Re-reading a published data set: every chunk checksum, and the digest of every volume's voxels and labels.

Nothing is repaired. Each problem names the volume and, where it lies in one object, that object's key.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from storage.errors import NotFound, NotOffered, StoreError
from storage.format.manifest import Manifest, fingerprint_of, manifest_key
from storage.format.records import VolumeRecord
from storage.format.volume_writer import content_sha256, label_record, region_count
from storage.format.zarr_metadata import parse_array
from storage.objects import join
from storage.reading.volume_store import VolumeStore


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it was written; `volume_id` is empty for the manifest itself."""

    volume_id: str
    what: str

    def __str__(self) -> str:
        return (
            self.what if not self.volume_id or self.volume_id in self.what else f"volume {self.volume_id}: {self.what}"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found.

    Args:
        url: The data set.
        fingerprint: The manifest that was verified.
        volumes: How many volumes it lists.
        nbytes: Voxels and labels read, in decoded bytes.
        problems: Everything that is wrong; empty when all is well.
        strangers: Volume folders that no row of this manifest names: unpublished, or of another version. None where
            the store cannot list what it holds.
    """

    url: str
    fingerprint: str
    volumes: int
    nbytes: int
    problems: tuple[Problem, ...]
    strangers: tuple[str, ...] | None = ()

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was written."""
        return not self.problems


Progress = Callable[[int, int, int], None]
"""Called with volumes done, volumes in all, decoded bytes so far."""


def verify(url: str, progress: Progress | None = None, *, fingerprint: str | None = None, threads: int = 16) -> Report:
    """Read every volume of the published manifest and compare it with its digest. Holds one volume in memory.

    Raises:
        NotFound: nothing is published at `url`.
        CorruptChunk: the manifest itself cannot be read.
        StoreError: the store refuses or does not answer, for the manifest.
    """
    manifest = Manifest.open(url, fingerprint)
    problems: list[Problem] = []
    listed: set[str] = set()
    nbytes = 0
    digest = fingerprint_of(manifest.records(), manifest.dataset)
    if digest != manifest.fingerprint:
        key = join(url, manifest_key(manifest.fingerprint))
        problems.append(Problem("", f"{key}: its rows have the fingerprint {digest}"))
    with VolumeStore(url, manifest, threads=threads) as store:
        for done, record in enumerate(manifest.records(), 1):
            listed.add(record.volume_id)
            size, wrong = _volume(store, record)
            nbytes += size
            problems += [Problem(record.volume_id, what) for what in wrong]
            if progress is not None:
                progress(done, len(manifest), nbytes)
        strangers: tuple[str, ...] | None = None
        with suppress(NotOffered):
            strangers = tuple(sorted({PurePosixPath(key).parts[1] for key in store.store.list("volumes/")} - listed))
    return Report(url, manifest.fingerprint, len(manifest), nbytes, tuple(problems), strangers)


def damage(url: str, record: VolumeRecord) -> list[str]:
    """What is wrong with one volume, published or not; empty when every byte is as the record says.

    Raises:
        StoreError: the store refuses or does not answer.
    """
    with VolumeStore(url, Manifest.from_records([record], {}), threads=2) as store:
        return _volume(store, record)[1]


def _volume(store: VolumeStore, record: VolumeRecord) -> tuple[int, list[str]]:
    """Decoded bytes and problems of one volume."""
    wrong: list[str] = []
    nbytes = 0
    arrays = {}
    derived = {facts.name: facts for facts in record.derived}
    for name in (None, *record.map_names()):
        try:
            array = store.read_volume(record.volume_id, name)
        except StoreError as error:
            wrong.append(str(error))
            continue
        nbytes += array.nbytes
        if name in derived:
            facts = derived[name]
            if content_sha256(array) != facts.content_sha256 or region_count(array) != facts.regions:
                wrong.append(f"map {name!r} does not hold what the manifest says of it")
            continue
        arrays[name] = array if name is None else array[0]
        if name is not None and label_record(name, array[0]) != record.label(name):
            wrong.append(f"label {name!r} does not hold what the manifest says of it")
    wrong += _documents(store, record)
    if not wrong:
        image = arrays.pop(None)
        digest = content_sha256(image, {name: array for name, array in arrays.items() if name is not None})
        if digest != record.content_sha256:
            wrong.append(f"content {digest} where the manifest says {record.content_sha256}")
    return nbytes, wrong


def _documents(store: VolumeStore, record: VolumeRecord) -> list[str]:
    """Problems of the metadata, which our reader need not ask but every other reader does."""
    root = f"volumes/{record.volume_id}"
    arrays: dict[str, str | None] = {f"{root}/0/zarr.json": None}
    groups = [f"{root}/zarr.json"]
    for name in record.map_names():
        arrays[f"{root}/labels/{name}/0/zarr.json"] = name
        groups += [f"{root}/labels/zarr.json", f"{root}/labels/{name}/zarr.json"]
    wrong = []
    for key in sorted({*arrays, *groups}):
        thing = join(store.url, key)
        try:
            document = store.store.get(key)
            if key in arrays:
                if parse_array(document, thing) != store.meta(record.volume_id, arrays[key]):
                    wrong.append(f"{thing} does not describe the array that the manifest does")
            else:
                wrong += [f"{thing} {what}" for what in _misplaced(json.loads(document)["attributes"], record)]
        except NotFound:
            wrong.append(f"{thing} is missing")
        except StoreError as error:
            wrong.append(str(error))
        except (ValueError, KeyError, TypeError) as error:
            wrong.append(f"{thing} is not Zarr metadata: {type(error).__name__}: {error}")
    return wrong


def _misplaced(attributes: dict[str, Any], record: VolumeRecord) -> list[str]:
    """What the metadata of a group say otherwise than the manifest: where a volume lies and what its values mean."""
    if "ome" not in attributes:
        return ["is not OME-Zarr"]
    wrong = []
    placed = {"scale": list(record.spacing_mm), "translation": [record.affine[i] for i in (11, 7, 3)]}
    for scales in attributes["ome"].get("multiscales", []):
        for transform in scales["datasets"][0]["coordinateTransformations"]:
            for kind in sorted(placed.keys() & transform.keys()):
                if transform[kind][-3:] != placed[kind]:
                    wrong.append(f"has the {kind} {transform[kind]} where the manifest says {placed[kind]}")
    facts: dict[str, Any] = {
        "affine_ras_mm": list(record.affine),
        "spacing_mm": list(record.spacing_mm),
        "scale": record.scale,
        "offset": record.offset,
        "content_sha256": record.content_sha256,
    }
    own = attributes.get("tomoscale", {})  # what others wrote may lack
    wrong += [
        f"has the {k} {own[k]} where the manifest says {facts[k]}" for k in facts if own.get(k, facts[k]) != facts[k]
    ]
    return wrong
