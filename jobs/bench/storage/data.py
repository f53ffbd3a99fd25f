"""The volumes of the read benchmark and the layouts they are written in."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from storage.errors import ConfigError
from storage.format.layout import choose_layout
from storage.format.manifest import Manifest
from storage.format.volume import Membership
from storage.format.volume import Volume as StoredVolume
from storage.format.volume_writer import write_volume
from storage.objects import join, open_store

Volume = npt.NDArray[np.int16]
Triple = tuple[int, int, int]
_NIBABEL: Any = nibabel  # half of it is untyped
CHUNK = 64
"""Chunk edge of the unsharded Zarr layout: one object a chunk, which zarr-python reads concurrently."""


@dataclass(frozen=True)
class DataSet:
    """Volumes (D, H, W) by name, and the crop they are read by."""

    name: str
    crop_DHW: Triple
    volumes: Mapping[str, Volume]

    def crops(self, count: int, seed: int) -> list[tuple[str, Triple]]:
        """A seeded list of (volume, first voxel), crops inside their volumes."""
        rng, names = np.random.default_rng([seed, 77]), list(self.volumes)
        out: list[tuple[str, Triple]] = []
        for _ in range(count):
            name = names[int(rng.integers(len(names)))]
            d, h, w = (
                int(rng.integers(n - c + 1)) for n, c in zip(self.volumes[name].shape, self.crop_DHW, strict=True)
            )
            out.append((name, (d, h, w)))
        return out

    def cut(self, name: str, start: Triple) -> Volume:
        """The voxels every reader has to return."""
        return self.volumes[name][tuple(slice(a, a + s) for a, s in zip(start, self.crop_DHW, strict=True))]


def phantoms(count: int, shape: Triple, crop_DHW: Triple = (96, 96, 96)) -> DataSet:
    """CT-like volumes in HU: a body with smooth organs, bones and lungs in air, and noise of 12 HU, correlated as a
    scanner's is. Neither constants nor white noise compress as real CT does.
    """
    return DataSet("phantom CT", crop_DHW, {f"ct-{i:02d}": _phantom(shape, i) for i in range(count)})


def real(limit: int) -> list[DataSet]:
    """Real volumes of the folder that $TOMOSCALE_DATASETS names: abdominal MR and chest CT, those that are there."""
    root = os.environ.get("TOMOSCALE_DATASETS", "")
    if not root or not limit:
        return []
    sets = []
    mr = {
        p.name.removesuffix(".nii.gz"): _nifti(p) for p in sorted(Path(root).glob("chaos_t2/images/*.nii.gz"))[:limit]
    }
    if mr:
        sets.append(_fitting("abdominal MR (CHAOS T2)", (24, 96, 96), mr))
    slices = sorted(p for p in Path(root).glob("formats/dicom_ct_chest/**/*") if p.is_file())
    if slices:
        sets.append(_fitting("chest CT (LIDC)", (48, 96, 96), {"chest": _dicom(slices)}))
    return sets


def _fitting(name: str, crop: Triple, volumes: dict[str, Volume]) -> DataSet:
    fitting = {k: v for k, v in volumes.items() if all(n >= c for n, c in zip(v.shape, crop, strict=True))}
    if not fitting:
        raise ConfigError(name, expected=f"volumes of at least {crop}", found=str([v.shape for v in volumes.values()]))
    return DataSet(name, crop, fitting)


def _dicom(paths: list[Path]) -> Volume:
    """Slices in the order of their names: voxels of a real CT, whatever their place in the body."""
    pydicom: Any = importlib.import_module("pydicom")
    slices = [pydicom.dcmread(path) for path in paths]
    values = [s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices]
    stacked: Volume = np.clip(np.stack(values), -32768, 32767).astype(np.int16)
    return stacked


def _phantom(shape: Triple, seed: int) -> Volume:
    rng = np.random.default_rng([seed, 5])
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    values = np.full(shape, -1000, np.float32)
    body = (x / 0.9) ** 2 + (y / 0.7) ** 2 + (z / 1.5) ** 2 < 1
    values[body] = 30
    for _ in range(14):
        centre, radius = rng.uniform(-0.6, 0.6, 3), rng.uniform(0.08, 0.35, 3)
        distance = sum(((a - c) / r) ** 2 for a, c, r in zip((z, y, x), centre, radius, strict=True))
        values[(distance < 1) & body] = rng.choice([-850.0, -90.0, 10.0, 55.0, 110.0, 650.0])
    values = ndimage.gaussian_filter(values, 1.0, output=np.float32)  # the point spread of a scanner
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 0.7, output=np.float32)
    return np.clip(values + noise * np.float32(12 / noise.std()), -1024, 3071).astype(np.int16)


def _nifti(path: Path) -> Volume:
    loaded = _NIBABEL.load(path)
    image = loaded.as_reoriented(_NIBABEL.io_orientation(loaded.affine))
    values = np.asanyarray(image.dataobj).transpose(2, 1, 0)
    return np.ascontiguousarray(np.clip(values, -32768, 32767).astype(np.int16))


Writer = Callable[[DataSet, Path], None]


def write_tomoscale(data: DataSet, folder: Path) -> None:
    """Our layout, with its manifest."""
    store = open_store(folder.as_uri())
    records = [
        write_volume(
            store,
            name,
            StoredVolume(array[None], spacing_mm=(1.0, 1.0, 1.0), affine=np.eye(4)),
            membership=Membership(split="train"),
            layout=choose_layout(_shape(array), data.crop_DHW),
        )
        for name, array in data.volumes.items()
    ]
    Manifest.from_records(records, {"name": data.name}).write(store)


def write_chunks(data: DataSet, folder: Path) -> None:
    """Zarr v3 without shards, zarr-python's default codecs."""
    import zarr

    for name, array in data.volumes.items():
        chunks = tuple(min(CHUNK, n) for n in array.shape)
        target = zarr.create_array(str(folder / name), shape=array.shape, dtype="int16", chunks=chunks)
        target[...] = array


def write_raw(data: DataSet, folder: Path) -> None:
    """Uncompressed `.npy`."""
    for name, array in data.volumes.items():
        np.save(folder / f"{name}.npy", array)


def write_nifti(data: DataSet, folder: Path) -> None:
    """`.nii.gz`, as data sets are handed out."""
    for name, array in data.volumes.items():
        _NIBABEL.save(_NIBABEL.Nifti1Image(array.transpose(2, 1, 0), np.eye(4)), folder / f"{name}.nii.gz")


def write_b2nd(data: DataSet, folder: Path) -> None:
    """blosc2 `.b2nd` as nnssl lays it out: see `b2nd_layout`; zstd level 8, blosc2's default filter."""
    blosc2 = importlib.import_module("blosc2")

    for name, array in data.volumes.items():
        block, chunk = b2nd_layout(data.crop_DHW, _shape(array))
        blosc2.asarray(
            array,
            urlpath=str(folder / f"{name}.b2nd"),
            chunks=chunk,
            blocks=block,
            cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8},
        )


def write_hdf5(data: DataSet, folder: Path) -> None:
    """HDF5, chunks of a third of the crop, gzip 4 with the shuffle filter."""
    h5py = importlib.import_module("h5py")

    for name, array in data.volumes.items():
        chunks = tuple(min(n, max(16, c // 3)) for n, c in zip(array.shape, data.crop_DHW, strict=True))
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("image", data=array, chunks=chunks, compression="gzip", shuffle=True)


WRITERS: dict[str, tuple[Writer, str]] = {
    "tomoscale": (write_tomoscale, "zarr"),
    "chunks": (write_chunks, "zarr"),
    "raw": (write_raw, "numpy"),
    "nifti": (write_nifti, "nibabel"),
    "b2nd": (write_b2nd, "blosc2"),
    "hdf5": (write_hdf5, "h5py"),
}
"""Layout name to its writer and the package it needs."""


class Layouts:
    """The layouts of one data set, written when first asked for: in a folder, and from there to S3."""

    def __init__(
        self,
        data: DataSet,
        folder: Path,
        s3_url: str | None,
        writers: Mapping[str, tuple[Writer, str]] = WRITERS,
    ) -> None:
        self.data, self._folder, self.s3_url, self._writers = data, folder, s3_url, writers
        self._uploaded: set[str] = set()

    def folder(self, layout: str) -> Path:
        """Where the layout lies on disk."""
        writer, package = self._writers[layout]
        target = self._folder / layout
        if not target.exists():
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"layout {layout}", expected=f"the package {package}", found="not installed")
            target.mkdir(parents=True)
            writer(self.data, target)
        return target

    def url(self, layout: str) -> str:
        """Where the layout lies on S3."""
        if self.s3_url is None:
            raise ConfigError("the benchmark's S3 store", expected="an s3:// URL", found="none")
        url = join(self.s3_url, layout)
        if layout not in self._uploaded:
            source, store = self.folder(layout), open_store(url)
            for path in sorted(p for p in source.rglob("*") if p.is_file()):
                store.put(path.relative_to(source).as_posix(), path.read_bytes())
            self._uploaded.add(layout)
        return url

    def files(self, layout: str) -> Iterator[Path]:
        """The files of a layout."""
        return (path for path in self.folder(layout).rglob("*") if path.is_file())

    def size(self, layout: str) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.files(layout))

    def forget_pages(self, layout: str) -> None:
        """Drop the layout's files from the page cache, so that the next read comes from the disk."""
        for path in self.files(layout):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def remove(self) -> None:
        """Delete what was put on S3."""
        for layout in self._uploaded:
            store = open_store(self.url(layout))
            for key in list(store.list()):
                store.delete(key)
        self._uploaded.clear()


def _shape(array: npt.NDArray[Any]) -> Triple:
    d, h, w = array.shape
    return int(d), int(h), int(w)


def b2nd_layout(crop: Triple, shape: Triple, itemsize: int = 2) -> tuple[Triple, Triple]:
    """nnssl's block and chunk of a volume, by its published rule.

    Blocks begin as the crop rounded up to powers of two; the axis that is longest relative to the crop is halved until
    a block fits 0.8 of an L1 cache of 32 KiB. Chunks grow by whole blocks, the least grown axis first, while they fit
    0.8 of an L3 share of 1.375 MiB and stay near one and a half crops.
    """
    block = [1 << (c - 1).bit_length() for c in crop]
    while prod(block) * itemsize > 0.8 * 32768:
        axis = max((a for a in range(3) if block[a] > 1), key=lambda a: block[a] / crop[a])
        block[axis] //= 2
    block = [min(b, n) for b, n in zip(block, shape, strict=True)]
    chunk = list(block)
    while open_axes := [a for a in range(3) if chunk[a] < shape[a]]:
        axis = min(open_axes, key=lambda a: chunk[a] / block[a])
        grown = [min(n, k + b * (a == axis)) for a, (k, b, n) in enumerate(zip(chunk, block, shape, strict=True))]
        near = sum(k / c for k, c in zip(grown, crop, strict=True)) / 3 <= 1.5
        if prod(grown) * itemsize > 0.8 * 1_441_792 or not near:
            break
        chunk = grown
    return (block[0], block[1], block[2]), (chunk[0], chunk[1], chunk[2])
