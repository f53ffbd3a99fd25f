"""The probe of a pre-training run: signs of collapse, and how well labels follow from the features.

Labels are only watched: which crops are read, and when, is no part of the sample sequence, nothing random is drawn
and no weight sees a label. Where the labelled crops cannot be read, the run goes on without them and says so.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from jobs.configs import PretrainConfig
from ssl_core.monitor.collapse import probe
from ssl_core.monitor.label_transfer import Labelled, knn_dice
from ssl_core.train.engine import Engine
from ssl_core.views.intensity import normalise
from ssl_core.views.types import ViewBatch, ViewSpec
from storage.errors import TomoscaleError
from storage.format.manifest import Manifest
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream
from storage.stream.plan import StreamSpec

_MOST_CLASSES = 64  # a map with more values is a partition, such as super-pixels, and names no structures


class LabelProbe:
    """Called by `ssl_core.train.loop.fit` on every rank at the same steps.

    Args:
        config: The job.
        store: Where it reads.
        spec: Views of the method; the first role's size is the labelled crops'.
        say: Hears why labels are not watched, once.
        clock: Seconds from a fixed point.
    """

    def __init__(
        self,
        config: PretrainConfig,
        store: VolumeStore,
        spec: ViewSpec,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config, self._store, self._say, self._clock = config, store, say, clock
        self._size_DHW = spec.roles[0].size_DHW
        self._labelled: Labelled | None = None
        self._off = config.probe.label is None
        self._began, self._spent_s, self._last_s = clock(), 0.0, 0.0

    def __call__(self, engine: Engine, views: ViewBatch) -> dict[str, float]:
        """Signs of collapse (`ssl_core.monitor.collapse`); when it is time also `probe/knn_dice` and its cost."""
        signs = probe(engine, views)
        every = self._config.probe.every or self._config.engine.probe_every
        due = engine.step_done % every == 0 or engine.step_done == engine.config.steps
        if self._off or not due or not self._affordable(engine):
            return signs
        began = self._clock()
        if self._labelled is None and not self._open(engine):
            return signs
        assert self._labelled is not None
        settings = self._config.probe
        dice = knn_dice(engine, self._labelled, k=settings.k, voxels=settings.voxels)
        self._last_s = self._clock() - began
        self._spent_s += self._last_s
        return signs | {"probe/knn_dice": dice, "time/knn_s": self._last_s}

    def _affordable(self, engine: Engine) -> bool:
        """Whether one more stays below the largest share of the time so far, on every rank."""
        room_s = self._config.probe.most_share * (self._clock() - self._began)
        return not self._any(engine, self._spent_s > 0 and self._spent_s + self._last_s > room_s)

    def _open(self, engine: Engine) -> bool:
        """Read the crops; on all ranks or on none."""
        reason = f"fewer than two subjects with label {self._config.probe.label!r} in this split"
        try:
            self._labelled = read_labelled(self._config, self._store, self._size_DHW, engine)
        except TomoscaleError as error:
            reason = str(error)
        read = self._labelled is not None
        self._off = self._any(engine, not read)
        if self._off and (read or self._config.probe.label != "auto" or self._store.manifest.label_names()):
            self._say(f"labels are not watched: {'another rank could not read them' if read else reason}")
        return not self._off

    @staticmethod
    def _any(engine: Engine, value: bool) -> bool:
        flag = torch.tensor(float(value), dtype=torch.float64, device=engine.device)
        return bool(engine.collectives.sum(flag) > 0)


def read_labelled(
    config: PretrainConfig, store: VolumeStore, size_DHW: tuple[int, int, int], engine: Engine
) -> Labelled | None:
    """One crop of each chosen subject, centred on a labelled voxel; `None` where two subjects are not to be had.

    Subjects come from the run's own split, so that no test subject is looked at; a function of the seed and the
    manifest.

    Raises:
        TomoscaleError: a crop could not be read.
    """
    subjects = config.probe.train + config.probe.test
    name = _label(store.manifest, config)
    indices = [] if name is None else _subjects(store.manifest, name, config, subjects)
    if len(indices) < 2:
        return None
    # One lane walks one permutation: its first batch holds every volume once.
    spec = StreamSpec(
        seed=config.engine.seed,
        global_batch=len(indices),
        crop_DHW=size_DHW,
        lanes=1,
        crops_per_visit=1,
        indices=tuple(indices),
        label=name,
        class_balance=1.0,
    )
    with CropStream(store, spec, prefetch=1, threads=1) as stream:
        batch = next(stream)
    stored = torch.from_numpy(np.ascontiguousarray(batch.image_BCDHW)).to(engine.device)
    image = normalise(stored, batch.scale_B, batch.offset_B, batch.stats_BCS, config.intensity, engine.dtype)
    label = torch.from_numpy(np.asarray(batch.label_BDHW, np.int64)).to(engine.device)
    # With fewer subjects than asked for, both sides shrink alike.
    train = max(1, min(len(indices) - 1, round(len(indices) * config.probe.train / subjects)))
    return Labelled(image, label, train)


def _label(manifest: Manifest, config: PretrainConfig) -> str | None:
    if config.probe.label != "auto":
        return config.probe.label
    for name in manifest.label_names():
        rows = manifest.select(split=config.stream.split, labelled=name)
        labels = manifest.record(int(rows[0])).labels if len(rows) else ()
        if any(label.name == name and 0 < len(label.values) <= _MOST_CLASSES for label in labels):
            return name
    return None


def _subjects(manifest: Manifest, name: str, config: PretrainConfig, count: int) -> list[int]:
    """Manifest rows of the first `wanted` subjects in an order drawn from the seed; a volume each."""
    rows = manifest.select(split=config.stream.split, labelled=name)
    order = np.random.Generator(np.random.Philox(key=config.engine.seed)).permutation(len(rows))
    by_subject: dict[str, int] = {}
    for row in rows[order].tolist():
        by_subject.setdefault(manifest.record(row).subject, row)
        if len(by_subject) == count:
            break
    return list(by_subject.values())
