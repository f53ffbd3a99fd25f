"""An endless, resumable stream of crop batches: the pure order of `storage.stream.order`, read ahead by threads.

What a stream yields depends on (seed, spec, manifest) and on where it starts; world size, threads and timing change
when a batch is ready, never what is in it. Resuming takes two integers, `state_dict()`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from storage.errors import ConfigError, StoreError, TomoscaleError
from storage.format.manifest import Manifest
from storage.intensity_stats import STATS_ORDER
from storage.reading.volume_store import Crop
from storage.stream.plan import Cut, Plan, StreamSpec, check_spec, select
from storage.stream.read_ahead import ReadAhead

CROPS_PER_CALL = 16
"""Crops planned in one `read_many`: enough to merge and overlap requests, few enough to bound what is in memory."""


class CropSource(Protocol):
    """What a stream needs of a `storage.reading.volume_store.VolumeStore`."""

    @property
    def manifest(self) -> Manifest:
        """The volumes."""

    def read_many(self, crops: Sequence[Crop], label: str | None = None) -> list[npt.NDArray[Any]]:
        """Crops as (C, D, H, W) arrays, or crops of a label or derived map, in the order asked."""


@dataclass
class HostBatch:
    """This rank's share of one global batch, samples ascending. B is global_batch / world.

    Attributes:
        image_BCDHW: Stored values, in the stored dtype; where volumes of a batch differ, the dtype that holds both.
        label_BDHW: Label values, or None.
        start_B3: First voxel of the crop in its volume, (D, H, W), int64; negative where the crop reaches beyond.
        volume_B: Manifest index, int64.
        sample_B: Global sample index, int64.
        scale_B: float32; value = stored * scale + offset.
        offset_B: float32.
        shape_B3: Voxels of the volume, (D, H, W), float64.
        spacing_B3: mm, (D, H, W), float64.
        stats_BCS: float32; foreground statistics of each channel, columns of `storage.intensity_stats.STATS_ORDER`.
        wait_s: Seconds the consumer waited for this batch.
        maps_BDHW: The maps of the spec by name, each (B, D, H, W), integers; 0 beyond the volume.
        centre_B3: Voxel of its volume that each crop was drawn about, (D, H, W), int64; None where nobody says.
    """

    image_BCDHW: npt.NDArray[Any]
    label_BDHW: npt.NDArray[Any] | None
    start_B3: npt.NDArray[np.int64]
    volume_B: npt.NDArray[np.int64]
    sample_B: npt.NDArray[np.int64]
    scale_B: npt.NDArray[np.float32]
    offset_B: npt.NDArray[np.float32]
    shape_B3: npt.NDArray[np.float64]
    spacing_B3: npt.NDArray[np.float64]
    stats_BCS: npt.NDArray[np.float32]
    wait_s: float = 0.0
    maps_BDHW: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    centre_B3: npt.NDArray[np.int64] | None = None


class CropStream:
    """Iterates endlessly over `HostBatch`es; a context manager that ends its threads on exit.

    One visit of a lane is read in one go and its crops are held until their batch comes, at most about `memory_bytes`
    of them (an estimate from the first volume); where a visit would not fit it is read in parts. Crops and order are
    the same either way.

    Args:
        store: Where crops are read; stays the caller's to close.
        spec: What to stream.
        rank: This rank, of `world`.
        world: Ranks; divides `spec.lanes` and `spec.global_batch`.
        start: Global sample index to start at: `state_dict()["next"]` of an earlier stream, or 0.
        prefetch: Batches in work or ready beyond the one the consumer has; the back-pressure.
        threads: Threads that read; one more stacks batches.
        memory_bytes: Bound on crops read before their batch, beyond those in the `prefetch` batches.

    Raises:
        ConfigError: a number that does not divide, an unknown label or split, an index outside the manifest.
    """

    def __init__(
        self,
        store: CropSource,
        spec: StreamSpec,
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        prefetch: int = 4,
        threads: int = 2,
        memory_bytes: int = 1 << 30,
    ) -> None:
        if start < 0 or prefetch < 1 or threads < 1:
            arguments = f"start={start}, prefetch={prefetch}, threads={threads}"
            raise ConfigError("crop stream", expected="start >= 0, prefetch >= 1, threads >= 1", found=arguments)
        check_spec(spec, rank=rank, world=world)
        self.spec, self.rank, self.world, self.start = spec, rank, world, start
        self.indices = select(store.manifest, spec)
        plan = Plan(store.manifest, spec, self.indices, rank=rank, world=world, start=start, memory_bytes=memory_bytes)
        reader = _Reader(store, plan)
        self._reads = ReadAhead(reader.read, depth=prefetch, threads=threads, name="crop-read")
        assembler = _Assembler(plan, self._reads)
        self._batches = ReadAhead(assembler.batch, depth=1, threads=1, name="crop-stack", on_stop=self._reads.stop)
        self._yielded = 0
        self._consumed: int | None = None

    def __iter__(self) -> Iterator[HostBatch]:
        """The stream itself: a second loop goes on where the first stopped."""
        return self

    def __next__(self) -> HostBatch:
        """The next batch.

        Raises:
            StoreError: a crop could not be read; names volume and key. The batches before it have all been yielded, and
                nothing is yielded in its place, now or later.
        """
        began = time.perf_counter()
        batch = self._batches.get()
        batch.wait_s = time.perf_counter() - began
        self._yielded += 1
        return batch

    def consumed(self, batch: HostBatch) -> None:
        """Say that the trainer has finished with `batch`; `state_dict` then points behind it.

        Until the first such call, asking for a batch counts the one before as consumed. That is right for a plain loop
        that saves before it asks again; whatever fetches ahead of the trainer, or saves after the step of the batch in
        hand, has to call this.
        """
        size = self.spec.global_batch
        self._consumed = self.start + ((int(batch.sample_B[0]) - self.start) // size + 1) * size

    def state_dict(self) -> dict[str, int]:
        """`{"seed", "next"}`; `next` is the first global sample that the trainer has not consumed."""
        implied = self.start + max(0, self._yielded - 1) * self.spec.global_batch
        return {"seed": self.spec.seed, "next": implied if self._consumed is None else self._consumed}

    def close(self, timeout_s: float = 60.0) -> None:
        """End the threads: what is being read is finished, nothing more is started. The store stays open.

        Raises:
            StoreError: a read was still going on after `timeout_s`.
        """
        if not all([self._batches.close(timeout_s), self._reads.close(timeout_s)]):
            raise StoreError("crop stream", expected=f"reads to end within {timeout_s:g} s", found="one still going on")

    def __enter__(self) -> "CropStream":
        """The stream."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close. A read that does not end in time hides no earlier error."""
        try:
            self.close()
        except StoreError:
            if error is None:
                raise


@dataclass(frozen=True, slots=True)
class _CutCrop:
    cut: Cut
    image_CDHW: npt.NDArray[Any]
    label_DHW: npt.NDArray[Any] | None
    maps_DHW: dict[str, npt.NDArray[Any]]


class _Reader:
    """Executes the reads of a plan. Knows nothing of the stream, so that dropping the stream ends its threads."""

    def __init__(self, store: CropSource, plan: Plan) -> None:
        self._store, self._plan = store, plan

    def read(self, k: int) -> list[_CutCrop]:
        crops: list[_CutCrop] = []
        call: list[Cut] = []
        for group in self._plan.reads(k):
            if call and len(call) + len(group) > CROPS_PER_CALL:
                crops += self._call(call)
                call = []
            call += group
        return crops + (self._call(call) if call else [])

    def _call(self, cuts: list[Cut]) -> list[_CutCrop]:
        spec = self._plan.spec
        images = self._read_many(cuts, None)
        labels = [None] * len(cuts) if spec.label is None else self._read_many(cuts, spec.label)
        read = {name: self._read_many(cuts, name) for name in spec.maps}
        maps = [{name: arrays[i] for name, arrays in read.items()} for i in range(len(cuts))]
        return [_CutCrop(*parts) for parts in zip(cuts, images, labels, maps, strict=True)]

    def _read_many(self, cuts: list[Cut], label: str | None) -> list[npt.NDArray[Any]]:
        names = ", ".join(dict.fromkeys(cut.crop.volume_id for cut in cuts))
        what = f"crops of {names}" if label is None else f"label {label!r} of {names}"
        try:
            arrays = self._store.read_many([cut.crop for cut in cuts], label=label)
        except TomoscaleError as error:
            if any(cut.crop.volume_id in error.thing for cut in cuts):
                raise
            thing = f"{what}: {error.thing}"
            raise type(error)(thing, expected=error.expected, found=error.found, remedy=error.remedy) from error
        except Exception as error:
            raise StoreError(what, expected="crops", found=f"{type(error).__name__}: {error}") from error
        out = []
        for cut, array in zip(cuts, arrays, strict=True):
            size = cut.crop.size_DHW
            channels = 1 if label is not None else self._plan.record(cut.volume).channels
            if array.shape != (channels, *size):
                expected = f"shape {(channels, *size)} for {cut.crop}"
                raise StoreError(what, expected=expected, found=f"shape {array.shape}")
            out.append(array if label is None else array[0])
        return out


class _Assembler:
    """Stacks batches from crops that were read for them or for an earlier batch. One thread uses it."""

    def __init__(self, plan: Plan, reads: ReadAhead[list[_CutCrop]]) -> None:
        self._plan, self._reads = plan, reads
        self._ahead: dict[int, _CutCrop] = {}

    def batch(self, k: int) -> HostBatch:
        # Reads come in the order of batches, so after the k-th every crop of batch k is there.
        self._ahead.update((crop.cut.sample, crop) for crop in self._reads.get())
        crops = [self._ahead.pop(sample) for sample in self._plan.batch(k)]
        records = [self._plan.record(h.cut.volume) for h in crops]
        if len({record.channels for record in records}) > 1:
            one_of_each = {r.channels: r.volume_id for r in records}
            counts = ", ".join(f"{channels} in {name}" for channels, name in sorted(one_of_each.items()))
            raise ConfigError("stream", expected="volumes with the same number of channels", found=counts)
        labels = [h.label_DHW for h in crops if h.label_DHW is not None]
        return HostBatch(
            image_BCDHW=_stack([h.image_CDHW for h in crops]),
            label_BDHW=_stack(labels) if labels else None,
            start_B3=np.array([h.cut.crop.start_DHW for h in crops], dtype=np.int64),
            volume_B=np.array([h.cut.volume for h in crops], dtype=np.int64),
            sample_B=np.array([h.cut.sample for h in crops], dtype=np.int64),
            scale_B=np.array([r.scale for r in records], dtype=np.float32),
            offset_B=np.array([r.offset for r in records], dtype=np.float32),
            shape_B3=np.array([r.shape_DHW for r in records], dtype=np.float64),
            spacing_B3=np.array([r.spacing_mm for r in records], dtype=np.float64),
            stats_BCS=np.array([[[c[key] for key in STATS_ORDER] for c in r.stats] for r in records], dtype=np.float32),
            maps_BDHW={name: _stack([h.maps_DHW[name] for h in crops]) for name in self._plan.spec.maps},
            centre_B3=np.array([h.cut.centre for h in crops], dtype=np.int64),
        )


def _stack(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    dtype = np.result_type(*{array.dtype for array in arrays})
    out = np.empty((len(arrays), *arrays[0].shape), dtype=dtype)
    for row, array in zip(out, arrays, strict=True):
        row[...] = array
    return out
