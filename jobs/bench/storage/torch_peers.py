"""The readers of `bench reads` that need torch: MONAI's datasets, torchio's queue and mosaicml-streaming.

MONAI and torchio keep NIfTI's axis order; their crops are contiguous in it and turned to (D, H, W) without a copy. All
load a whole volume for a crop, whatever they cut from it.
"""

import importlib
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.dataset import CacheDataset, PersistentDataset
from monai.transforms.compose import Compose
from monai.transforms.croppad.array import SpatialCrop
from monai.transforms.io.array import LoadImage
from monai.transforms.io.dictionary import LoadImaged
from monai.transforms.utility.array import EnsureChannelFirst
from monai.transforms.utility.dictionary import EnsureChannelFirstd

from jobs.bench.storage.data import DataSet, Layouts, Triple, Writer, write_nifti
from jobs.bench.storage.peers import CropStart, Peer, Reader, Voxels

# Every LoadImage warns of a GPU decoder of DICOM that is absent; these readers read NIfTI.
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)

CROPS_PER_LOAD = 4
"""Crops that torchio's queue cuts from a volume it has loaded, as many as our stream takes from a visit."""
STREAMING = "pip install --no-deps mosaicml-streaming and what it imports; its pins do not fit this lock file"


class _Monai:
    """One crop after another, cut by MONAI's `SpatialCrop` from what `load` gives: (1, W, H, D)."""

    def __init__(self, load: Callable[[str], Any], crop: Triple) -> None:
        self._load, self._crop = load, crop

    def read(self, starts: Sequence[CropStart]) -> list[Voxels]:
        out: list[Voxels] = []
        for name, start in starts:
            stop = [a + s for a, s in zip(start, self._crop, strict=True)]
            cut: Any = SpatialCrop(roi_start=start[::-1], roi_end=stop[::-1])(self._load(name))
            # A copy, as collating a batch makes one: a crop alone is a view.
            out.append(np.array(cut[0].numpy(), order="C").transpose(2, 1, 0))
        return out

    def close(self) -> None:
        self._load = _closed


def _closed(name: str) -> Any:
    raise ValueError(f"{name} is asked of a closed reader")


def _items(data: DataSet, folder: Path) -> list[dict[str, str]]:
    return [{"image": str(folder / f"{name}.nii.gz")} for name in data.volumes]


def _load() -> Compose:
    # MONAI's float32 would double what is read and copied.
    return Compose([LoadImaged(keys="image", dtype=np.int16), EnsureChannelFirstd(keys="image")])


def _by_name(data: DataSet, dataset: Any) -> Callable[[str], Any]:
    places = {name: i for i, name in enumerate(data.volumes)}
    return lambda name: dataset[places[name]]["image"]


def _nifti(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    folder = at.folder("nifti")
    load = Compose([LoadImage(dtype=np.int16, image_only=True), EnsureChannelFirst()])
    return _Monai(lambda name: load(folder / f"{name}.nii.gz"), at.data.crop_DHW)


def _persistent(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    folder = at.folder("persistent")
    dataset = PersistentDataset(_items(at.data, folder / "source"), _load(), cache_dir=folder / "cache")
    return _Monai(_by_name(at.data, dataset), at.data.crop_DHW)


def _cached(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    items = _items(at.data, at.folder("nifti"))
    dataset = CacheDataset(items, _load(), progress=False, copy_cache=False)
    return _Monai(_by_name(at.data, dataset), at.data.crop_DHW)


def write_persistent(data: DataSet, folder: Path) -> None:
    """The cache that the first pass of a `PersistentDataset` leaves."""
    source = folder / "source"
    source.mkdir()
    write_nifti(data, source)
    dataset = PersistentDataset(_items(data, source), _load(), cache_dir=folder / "cache")
    for i in range(len(dataset)):
        dataset[i]
    shutil.rmtree(source)


class _Queue:
    """torchio's queue in this process. It draws its own crops, which `drawn` names."""

    def __init__(self, at: Layouts) -> None:
        tio: Any = importlib.import_module("torchio")
        self._tio, folder = tio, at.folder("nifti")
        subjects = [
            tio.Subject(image=tio.ScalarImage(folder / f"{name}.nii.gz"), name=name) for name in at.data.volumes
        ]
        sampler = tio.UniformSampler(at.data.crop_DHW[::-1])
        torch.manual_seed(0)
        queue = tio.Queue(tio.SubjectsDataset(subjects), CROPS_PER_LOAD, CROPS_PER_LOAD, sampler)
        self._queue = queue
        self.drawn: list[CropStart] = []

    def read(self, starts: Sequence[CropStart]) -> list[Voxels]:
        out: list[Voxels] = []
        for k in range(len(starts)):
            patch = self._queue[k]
            w, h, d = (int(n) for n in patch[self._tio.LOCATION][:3])
            self.drawn.append((str(patch["name"]), (d, h, w)))
            out.append(np.array(patch["image"].data[0].numpy(), order="C").transpose(2, 1, 0))
        return out

    def close(self) -> None:
        self._queue = None


def _queue(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    return _Queue(at)


class _Streaming:
    """Whole volumes of a `StreamingDataset`, fetched when first asked for and then read from its local copy."""

    def __init__(self, url: str, at: Layouts, scratch: Path) -> None:
        streaming: Any = importlib.import_module("streaming")
        self._dataset = streaming.StreamingDataset(remote=url, local=str(scratch / "local"), batch_size=1)
        self._places = {name: i for i, name in enumerate(at.data.volumes)}
        self._crop = at.data.crop_DHW

    def read(self, starts: Sequence[CropStart]) -> list[Voxels]:
        out: list[Voxels] = []
        for name, start in starts:
            image = self._dataset[self._places[name]]["image"]
            box = tuple(slice(a, a + s) for a, s in zip(start, self._crop, strict=True))
            out.append(np.array(image[box], order="C"))
        return out

    def close(self) -> None:
        self._dataset = None


def _streaming(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    return _Streaming(at.url("mds"), at, scratch)


def write_mds(data: DataSet, folder: Path) -> None:
    """MDS shards of whole volumes, zstd, the library's shard size."""
    streaming: Any = importlib.import_module("streaming")
    columns = {"name": "str", "image": "ndarray:int16"}
    with streaming.MDSWriter(out=str(folder), columns=columns, compression="zstd") as writer:
        for name, array in data.volumes.items():
            writer.write({"name": name, "image": array})


TORCH_WRITERS: dict[str, tuple[Writer, str]] = {
    "persistent": (write_persistent, "monai"),
    "mds": (write_mds, "streaming"),
}

TORCH_PEERS: tuple[Peer, ...] = (
    Peer("mosaicml-streaming", "s3", "mds", "streaming", _streaming, (1,), install=STREAMING),
    Peer("mosaicml-streaming, local copy", "cache", "mds", "streaming", _streaming, (1,), install=STREAMING),
    Peer("monai nifti.gz", "local", "nifti", "monai", _nifti, (1,)),
    Peer("monai PersistentDataset", "local", "persistent", "monai", _persistent, (1,)),
    Peer("monai CacheDataset", "local", "nifti", "monai", _cached, (1,), states=("warm",), note="all in memory"),
    Peer(
        "torchio Queue", "local", "nifti", "torchio", _queue, (CROPS_PER_LOAD,),
        own_crops=True, note=f"its own crops, {CROPS_PER_LOAD} a load",
    ),
)  # fmt: skip
