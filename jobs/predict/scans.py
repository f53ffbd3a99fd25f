"""What `tomoscale predict` is pointed at: a file, a DICOM series, a folder of either, or a store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_core.portable import Predictor
from ssl_core.portable.geometry import Frame
from ssl_core.portable.inference.slabs import Slabs
from ssl_core.portable.nifti import Nifti, read_nifti
from storage.errors import ConfigError
from storage.format.manifest import POINTER, Manifest
from storage.ingest.discover import discover
from storage.ingest.items import IngestItem
from storage.ingest.readers.raw import ReadPolicy
from storage.ingest.readers.read import read_item
from storage.reading.slabs import StoredSlabs
from storage.reading.volume_store import VolumeStore

DICOM = "dicom"
_ALL = ReadPolicy(four_d="channels")  # the model says how many channels it takes


@dataclass(frozen=True)
class Volume:
    """A scan that was read, or is to be read slab by slab.

    Attributes:
        affine: (4, 4); voxel-centre indices to RAS+ mm.
        array: (I, J, K) or (I, J, K, C) in file order; None of a volume in a store.
        slabs: The volume in a store, which is canonical; None of others.
        modality: `CT`, `MR`, ... where its format says it.
        stats: Recorded foreground statistics of each channel; None where there are none.
        notes: What its reader assumed or corrected.
        like: The NIfTI file, whose geometry fields the mask keeps.
    """

    affine: NDArray[np.float64]
    array: NDArray[Any] | None = None
    slabs: StoredSlabs | None = None
    modality: str = ""
    stats: Sequence[dict[str, float]] | None = None
    notes: tuple[str, ...] = ()
    like: Nifti | None = None

    def whole(self) -> NDArray[Any]:
        """All voxels, (I, J, K) or (I, J, K, C) in file order."""
        if self.array is not None:
            return self.array
        if self.slabs is None:
            raise ValueError("a volume has voxels in memory or in a store")
        values_CDHW = self.slabs.read(0, self.slabs.shape_CDHW[1])
        return _plain(np.ascontiguousarray(values_CDHW.transpose(3, 2, 1, 0)))

    def admitted(self, predictor: Predictor, name: str) -> tuple[Frame, Slabs]:
        """The canonical frame and the volume in it, after its values were found to be what networks compute with.

        Raises:
            RefusedInput: see `Predictor.canonical`.
        """
        if self.slabs is not None:
            return Frame(self.affine), predictor.check_values(name, self.slabs)
        canonical = predictor.canonical(self.whole(), self.affine, name=name)
        return canonical, Slabs.of(canonical.values_CDHW)


@dataclass(frozen=True)
class Scan:
    """A scan to predict.

    Attributes:
        name: What its mask is called, without an ending.
        source: What messages call it.
        item: Its files; None of a volume in a store.
        store: The store, and the index of the volume in its manifest.
    """

    name: str
    source: str
    item: IngestItem | None = None
    store: tuple[VolumeStore, int] | None = None

    @property
    def kind(self) -> str:
        """Name of its format."""
        return "store" if self.item is None else self.item.kind

    def read(self) -> Volume:
        """Its voxels, or where to read them.

        Raises:
            RefusedInput: it cannot be read.
        """
        if self.store is not None:
            store, index = self.store
            record = store.manifest.record(index)
            return Volume(
                np.array(record.affine).reshape(4, 4),
                slabs=StoredSlabs(store, record.volume_id),
                modality=record.modality,
                stats=record.stats,
            )
        if self.item is None:
            raise ValueError("a scan is a volume of a store or has files")
        (first, *others) = self.item.images
        if self.kind == "nifti" and not others and first.lower().endswith((".nii", ".nii.gz")):
            image = read_nifti(first)
            return Volume(image.affine, image.array, notes=image.notes, like=image)
        raw = read_item(self.item, _ALL)
        array = _plain(np.ascontiguousarray(raw.array_CDHW.transpose(3, 2, 1, 0)))
        return Volume(raw.affine, array, modality=raw.modality, notes=tuple(raw.notes))


def scans_of(source: str, split: str | None = None, volume: str | None = None) -> list[Scan]:
    """The scans behind a path or URL, by name.

    Args:
        source: A file, a folder, or the URL or folder of a store.
        split: Of a store: only this split.
        volume: Of a store: only this volume.

    Raises:
        ConfigError: no such place, a split that a folder does not have, or one without volumes.
        RefusedInput: nothing in it is a volume.
    """
    if "://" in source or (Path(source) / POINTER).is_file():
        return list(_of_store(source, split, volume))
    if split is not None or volume is not None:
        raise ConfigError(
            "--split and --volume",
            expected="a store",
            found=source,
            remedy="leave it out, or name the URL of an ingested store",
        )
    path = Path(source)
    if path.is_file() and path.name.lower().endswith((".nii", ".nii.gz")):  # named, so it is what it is called
        stem = path.name[: path.name.lower().rindex(".nii")]
        return [Scan(stem, source, IngestItem(stem, "nifti", (str(path),), None, "", path.name))]
    return [Scan(item.name.replace("/", "__"), _thing(source, item, path), item) for item in discover(source).items]


def _thing(source: str, item: IngestItem, path: Path) -> str:
    return source if path.is_file() else item.source


def _of_store(url: str, split: str | None, volume: str | None) -> Iterator[Scan]:
    manifest = Manifest.open(url)
    indices = manifest.select(split=split).tolist() if volume is None else [manifest.index_of(volume)]
    if not indices:
        raise ConfigError(
            f"split {split!r} of {url}", expected="volumes", found="none", remedy="`tomoscale data show URL` lists them"
        )
    store = VolumeStore(url, manifest)
    for index in indices:
        name = manifest.record(index).volume_id
        yield Scan(name.replace("/", "__"), name, store=(store, index))


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """(I, J, K) where there is one channel."""
    return array[..., 0] if array.shape[-1] == 1 else array
