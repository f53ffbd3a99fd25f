"""The readers that are compared. Each takes crops of one `DataSet` and returns the voxels as int16 (D, H, W).

A reader is made anew for every cold pass. `in_flight` crops are asked for at a time, by whatever means the library has
for that: one plan here, futures in tensorstore, threads elsewhere. Readers that need torch live in
`jobs.bench.storage.torch_peers`.
"""

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import nibabel
import numpy as np
import numpy.typing as npt

from jobs.bench.storage.data import Layouts, Triple
from storage.objects import open_store
from storage.objects.aws import resolve
from storage.reading.node_cache import NodeCache
from storage.reading.volume_store import Crop, VolumeStore

IN_FLIGHT = 32
"""Requests in flight for ours: what tensorstore's `s3_request_concurrency` allows it."""
CACHE_BYTES = 4 << 20
"""Memory tensorstore and HDF5 may cache in. Tensorstore keeps shard indexes there, without which it asks for them again
at every crop; more would hold a good part of these small data sets, which it could not do with a real one.
"""

Voxels = npt.NDArray[Any]
CropStart = tuple[str, Triple]
"""A volume's name and the first voxel of a crop of it."""


class Reader(Protocol):
    """An open reader. One that chooses its own crops has their list in `drawn`."""

    def read(self, starts: Sequence[CropStart]) -> list[Voxels]:
        """Crops (D, H, W) in the order asked, copied to memory of their own."""

    def close(self) -> None:
        """Let go of threads and files."""


@dataclass(frozen=True)
class Peer:
    """One way of reading.

    Attributes:
        name: As in the table.
        where: `s3`, `local`, or `cache` for S3 behind the node's cache.
        layout: Key of `jobs.bench.storage.data.WRITERS`.
        package: What has to be installed.
        make: Opens it; `scratch` is an empty folder of this reader's own.
        in_flight: Crops asked for at a time, in separate measurements.
        states: Which of cold and warm mean something for it.
        own_crops: It takes no list but draws crops itself; as many are counted.
        note: What a reader of the table has to know.
        install: How to get the package.
    """

    name: str
    where: str
    layout: str
    package: str
    make: Callable[[Layouts, int, Path], Reader]
    in_flight: tuple[int, ...]
    states: tuple[str, ...] = ("cold", "warm")
    own_crops: bool = False
    note: str = ""
    install: str = "pip install 'tomoscale[bench]'"


class _Ours:
    def __init__(self, url: str, crop: Triple, cache: NodeCache | None = None) -> None:
        self._store, self._crop = VolumeStore(url, cache=cache, threads=IN_FLIGHT), crop

    def read(self, starts: Sequence[CropStart]) -> list[Voxels]:
        return [voxels[0] for voxels in self._store.read_many([Crop(n, s, self._crop) for n, s in starts])]

    def close(self) -> None:
        self._store.close()


class _Indexed:
    """Anything that is sliced, one crop a thread."""

    def __init__(
        self,
        opener: Callable[[str], Any],
        crop: Triple,
        in_flight: int,
        *,
        keep: bool = True,
        closer: Callable[[], None] = lambda: None,
    ) -> None:
        self._opener, self._crop, self._keep, self._closer = opener, crop, keep, closer
        self._open: dict[str, Any] = {}
        self._pool = ThreadPoolExecutor(in_flight) if in_flight > 1 else None

    def read(self, starts: Sequence[CropStart]) -> list[Voxels]:
        if self._pool is None:
            return [self._one(start) for start in starts]
        return list(self._pool.map(self._one, starts))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._open.clear()
        self._closer()

    def _one(self, crop: CropStart) -> Voxels:
        name, start = crop
        array = self._open.get(name)
        if array is None:
            array = self._opener(name)
            if self._keep:
                self._open[name] = array
        box = tuple(slice(a, a + s) for a, s in zip(start, self._crop, strict=True))
        # Our layout has a channel axis in front.
        cut = array[(0, *box)] if array.ndim == 4 else array[box]
        # A copy, since a view of a memory map has read nothing yet.
        return np.array(cut, dtype=np.int16, order="C")


class _TensorStore:
    def __init__(self, spec: Callable[[str], dict[str, Any]], crop: Triple) -> None:
        import tensorstore

        self._ts, self._spec, self._crop = tensorstore, spec, crop
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._open: dict[str, Any] = {}

    def read(self, starts: Sequence[CropStart]) -> list[Voxels]:
        new = {name: self._start(name) for name, _ in starts if name not in self._open}
        self._open.update({name: future.result() for name, future in new.items()})
        futures = []
        for name, start in starts:
            box = tuple(slice(a, a + s) for a, s in zip(start, self._crop, strict=True))
            array = self._open[name]
            futures.append((array[(0, *box)] if array.ndim == 4 else array[box]).read())
        return [np.ascontiguousarray(future.result()) for future in futures]

    def close(self) -> None:
        self._open.clear()

    def _start(self, name: str) -> Any:
        return self._ts.open(
            {"driver": "zarr3", "kvstore": self._spec(name), "recheck_cached_data": False},
            read=True,
            context=self._context,
        )


def _path(layout: str, name: str) -> str:
    return f"volumes/{name}/0" if layout == "tomoscale" else name


def _ours_s3(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    return _Ours(at.url("tomoscale"), at.data.crop_DHW)


def _ours_cache(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    return _Ours(at.url("tomoscale"), at.data.crop_DHW, NodeCache(scratch, 8 << 30))


def _ours_local(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    return _Ours(at.folder("tomoscale").as_uri(), at.data.crop_DHW)


def _zarr_s3fs(layout: str) -> Callable[[Layouts, int, Path], Reader]:
    def make(at: Layouts, in_flight: int, scratch: Path) -> Reader:
        import zarr
        from zarr.core.sync import sync
        from zarr.storage import FsspecStore

        url, endpoint = at.url(layout), resolve().endpoint
        options = {"client_kwargs": {"endpoint_url": endpoint}, "skip_instance_cache": True}
        store = FsspecStore.from_url(url, storage_options=options, read_only=True)
        return _Indexed(
            lambda name: zarr.open_array(store, path=_path(layout, name), mode="r"),
            at.data.crop_DHW,
            in_flight,
            closer=lambda: sync(store.fs.s3.close()),
        )

    return make


def _object_store(url: str) -> Any:
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    parts, access = urlsplit(url), resolve()
    options: Any = {"region": access.region, "virtual_hosted_style_request": access.endpoint is None}
    if access.endpoint is not None:
        options["endpoint"] = access.endpoint
    options["credential_provider"] = access.credential
    remote = S3Store(
        parts.netloc,
        prefix=parts.path.strip("/"),
        client_options={"allow_http": True},
        **options,
    )
    return ObjectStore(remote, read_only=True)


def _zarr_obstore(layout: str) -> Callable[[Layouts, int, Path], Reader]:
    def make(at: Layouts, in_flight: int, scratch: Path) -> Reader:
        import zarr

        store = _object_store(at.url(layout))
        return _Indexed(
            lambda name: zarr.open_array(store, path=_path(layout, name), mode="r"), at.data.crop_DHW, in_flight
        )

    return make


def _zarrs(at: Layouts, in_flight: int, store: Any) -> Reader:
    """zarr-python with the pipeline of zarrs, which is chosen when an array is opened, by a setting of the process."""
    import zarr

    setting = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    importlib.import_module("zarrs")
    lock = threading.Lock()

    def opener(name: str) -> Any:
        with lock, zarr.config.set(setting):
            return zarr.open_array(store, path=_path("tomoscale", name), mode="r")

    return _Indexed(opener, at.data.crop_DHW, in_flight)


def _zarrs_s3(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    return _zarrs(at, in_flight, _object_store(at.url("tomoscale")))


def _zarrs_local(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    return _zarrs(at, in_flight, str(at.folder("tomoscale")))


def _zarr_local(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    import zarr

    folder = at.folder("tomoscale")
    return _Indexed(
        lambda name: zarr.open_array(str(folder / _path("tomoscale", name)), mode="r"), at.data.crop_DHW, in_flight
    )


def _tensorstore_s3(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    parts, access = urlsplit(at.url("tomoscale")), resolve()
    base = {
        "driver": "s3",
        "bucket": parts.netloc,
        "aws_region": access.region,
        "aws_credentials": {"type": "environment"},
    }
    if access.endpoint is not None:
        base["endpoint"] = access.endpoint
    prefix = parts.path.strip("/")
    return _TensorStore(lambda name: {**base, "path": f"{prefix}/{_path('tomoscale', name)}/"}, at.data.crop_DHW)


def _tensorstore_local(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    folder = at.folder("tomoscale")
    return _TensorStore(
        lambda name: {"driver": "file", "path": f"{folder / _path('tomoscale', name)}/"}, at.data.crop_DHW
    )


def _memmap(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    folder = at.folder("raw")
    return _Indexed(lambda name: np.load(folder / f"{name}.npy", mmap_mode="r"), at.data.crop_DHW, in_flight)


def _b2nd(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    blosc2 = importlib.import_module("blosc2")

    folder = at.folder("b2nd")
    blosc2.set_nthreads(1)  # as nnssl reads
    return _Indexed(
        lambda name: blosc2.open(str(folder / f"{name}.b2nd"), mode="r", mmap_mode="r", dparams={"nthreads": 1}),
        at.data.crop_DHW,
        in_flight,
    )


def _hdf5(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    h5py = importlib.import_module("h5py")

    folder = at.folder("hdf5")
    return _Indexed(
        lambda name: h5py.File(folder / f"{name}.h5", "r", rdcc_nbytes=CACHE_BYTES // len(at.data.volumes))["image"],
        at.data.crop_DHW,
        in_flight,
    )


def _load_nifti(path: Path) -> Voxels:
    load: Any = nibabel.nifti1.load
    image = load(path)
    voxels: Voxels = np.asanyarray(image.dataobj).transpose(2, 1, 0)
    return voxels


def _nifti_local(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    folder = at.folder("nifti")
    return _Indexed(lambda name: _load_nifti(folder / f"{name}.nii.gz"), at.data.crop_DHW, in_flight, keep=False)


def _nifti_s3(at: Layouts, in_flight: int, scratch: Path) -> Reader:
    store = open_store(at.url("nifti"))

    def fetch(name: str) -> Voxels:
        path = scratch / f"{name}.nii.gz"
        path.write_bytes(store.get(path.name))
        return _load_nifti(path)

    return _Indexed(fetch, at.data.crop_DHW, in_flight, keep=False)


PEERS: tuple[Peer, ...] = (
    Peer("tomoscale", "s3", "tomoscale", "zarr", _ours_s3, (1, 8)),
    Peer("zarr + s3fs", "s3", "tomoscale", "s3fs", _zarr_s3fs("tomoscale"), (1, 8)),
    Peer("zarr + obstore", "s3", "tomoscale", "obstore", _zarr_obstore("tomoscale"), (1, 8)),
    # Eight threads gained it nothing (6 crops/s against 7, and 0.7 against 0.8 at 20 ms) and took most of a round.
    Peer("zarrs + obstore", "s3", "tomoscale", "zarrs", _zarrs_s3, (1,)),
    Peer("zarr + s3fs, unsharded", "s3", "chunks", "s3fs", _zarr_s3fs("chunks"), (8,)),
    Peer("zarr + obstore, unsharded", "s3", "chunks", "obstore", _zarr_obstore("chunks"), (8,)),
    Peer("tensorstore", "s3", "tomoscale", "tensorstore", _tensorstore_s3, (1, 8)),
    Peer("nifti.gz", "s3", "nifti", "nibabel", _nifti_s3, (1,)),
    Peer("tomoscale, node cache", "cache", "tomoscale", "zarr", _ours_cache, (1, 8)),
    Peer("tomoscale, local", "local", "tomoscale", "zarr", _ours_local, (1, 8)),
    Peer("zarr, local", "local", "tomoscale", "zarr", _zarr_local, (1,)),
    Peer("zarrs, local", "local", "tomoscale", "zarrs", _zarrs_local, (1,)),
    Peer("tensorstore, local", "local", "tomoscale", "tensorstore", _tensorstore_local, (1, 8)),
    Peer("blosc2 b2nd", "local", "b2nd", "blosc2", _b2nd, (1,)),
    Peer("hdf5", "local", "hdf5", "h5py", _hdf5, (1,)),
    Peer("nifti.gz, local", "local", "nifti", "nibabel", _nifti_local, (1,)),
    Peer("memmap", "local", "raw", "numpy", _memmap, (1, 8)),
)
