"""Fine-tuning a segmenter on few labelled volumes, from a pre-trained start or from random weights.

Both starts get the same decoder (drawn from the seed), the same crops, augmentations and number of steps, so that what
is transferred is the only difference. The loop is that of pre-training, `ssl_core.train.engine`. The epoch's metric is
measured on volumes of other subjects, whole, with the sliding window that prediction uses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ssl_core.config import digest
from ssl_core.distributed import Collectives, Single
from ssl_core.downstream.measure import label_values as label_values
from ssl_core.downstream.measure import module_of, volume_dice
from ssl_core.downstream.measure import predict_volume as predict_volume
from ssl_core.downstream.measure import score_volumes as score_volumes
from ssl_core.downstream.objective import Segmentation
from ssl_core.downstream.settings import FinetuneConfig as FinetuneConfig
from ssl_core.downstream.transfer import Start as Start
from ssl_core.downstream.transfer import build_segmenter as build_segmenter
from ssl_core.networks.backbone import Backbone
from ssl_core.portable.inference.settings import PLAIN, Inference, sided
from ssl_core.train import checkpoint
from ssl_core.train.engine import Engine
from ssl_core.train.loop import fit
from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import ViewBatch
from storage.errors import ConfigError
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream
from storage.stream.plan import StreamSpec

OnEpoch = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Subjects:
    """Manifest indices of labelled volumes by use; no subject appears in two of them.

    Attributes:
        train: What the weights are learned from.
        inner: What steers the search.
        test: What is only ever tested.
    """

    train: tuple[int, ...]
    inner: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class TrainedSegmenter:
    """A trained segmenter and everything that scoring and bundling it takes.

    Attributes:
        network: With `len(labels) + 1` output channels.
        store: Where its volumes are; whoever asked for the training closes it.
        subjects: Volumes by use.
        labels: Label value to name, in the order of the classes 1, 2, ...
        intensity: Policy of its encoder.
        history: Metrics of each epoch.
        device: Where it was trained.
        notes: What a person who uses it should know of how it began.
        inference: What prediction does with its output.
    """

    network: Backbone
    store: VolumeStore
    subjects: Subjects
    labels: Mapping[int, str]
    intensity: IntensityPolicy
    history: tuple[Mapping[str, float], ...]
    device: torch.device
    notes: tuple[str, ...] = ()
    inference: Inference = PLAIN


class Checkpoints(Protocol):
    """Where a training keeps its state between epochs."""

    def newest(self) -> Path | None:
        """Folder of the newest checkpoint; None before the first."""
        ...

    def save(self, state: Mapping[str, Any], meta: Mapping[str, Any], *, last: bool) -> None:
        """Keep a state; see `ssl_core.train.checkpoint.save`. All but the `last` of a training may be left out."""
        ...


class FolderCheckpoints:
    """The newest checkpoint of a training in a folder of this machine.

    Args:
        folder: Made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "newest"

    def newest(self) -> Path | None:
        """See `Checkpoints.newest`."""
        return self.path if self.path.exists() else None

    def save(self, state: Mapping[str, Any], meta: Mapping[str, Any], *, last: bool) -> None:
        """See `Checkpoints.save`; keeps each."""
        checkpoint.save(self.path, state, meta)


def train_segmenter(
    network: Backbone,
    config: FinetuneConfig,
    store: VolumeStore,
    *,
    train: Sequence[int],
    inner: Sequence[int],
    label: str,
    labels: Mapping[int, str],
    policy: IntensityPolicy,
    pretrained: bool,
    seed: int,
    device: torch.device,
    on_epoch: OnEpoch = lambda _epoch, _metrics: None,
    collectives: Collectives | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[dict[str, float]]:
    """Train in place and return each epoch's metrics (`loss`, `inner_dice`).

    Args:
        network: From `build_segmenter`.
        config: Settings.
        store: Where the volumes are.
        train: Manifest indices to learn from.
        inner: Manifest indices of other subjects, for the metric; may be empty.
        label: Label map.
        labels: Label value to name, in the order of the classes 1, 2, ...
        policy: Intensity normalisation.
        pretrained: Whether `encoder_lr_scale` and `trained` apply.
        seed: Seed of crops and augmentations.
        device: Where to train.
        on_epoch: Called after each epoch, counted from 1, on every rank; may raise to stop. A training that goes on
            from a checkpoint calls it for the epochs before as well.
        collectives: The ranks, each of which calls this with the same arguments; one by default.
        checkpoints: Where the state is kept after each epoch. A training that has one there goes on from it, to the
            same bits.

    Raises:
        ConfigError: no inner volume where one is to decide, or the checkpoint is of another training.
        NonFiniteError: names step and samples.
    """
    require_inner(config, inner)
    ranks: Collectives = Single() if collectives is None else collectives
    module_of(network)
    parts: list[Parts] = []  # those of the settings that hold now

    def begin(stage: FinetuneConfig) -> Parts:
        part = Segmentation(network, stage, label=label, labels=labels, pretrained=pretrained, seed=seed)
        parts[:] = [Parts(part, part.measured.net, part.losses)]
        measured[:] = [part.measured]
        return parts[0]

    measured: list[Backbone] = []
    identity = {"training": repr((tuple(train), tuple(inner), label, dict(labels), pretrained, seed))}
    if config.flip[2] and sided(labels.values()):  # a training of before mirrored them: its second half would not
        identity["mirrored"] = "not along W"

    def dice_of(index: int) -> float:
        return volume_dice(
            measured[0],
            store,
            index,
            label=label,
            labels=labels,
            policy=policy,
            window=config.patch_DHW,
            device=device,
        )

    @contextmanager
    def batches(engine: Engine, stage: FinetuneConfig) -> Iterator[Iterator[ViewBatch]]:
        views = stage.views(label, labels.values())
        spec = _stream_spec(stage, seed, host_size(views), tuple(train), label)
        start = engine.step_done * stage.batch
        with CropStream(store, spec, rank=ranks.rank, world=ranks.world, start=start, prefetch=2, threads=1) as stream:
            yield (
                make_views(batch, views, seed=seed, policy=policy, device=device, dtype=engine.dtype)
                for batch in stream
            )

    history, best = train_epochs(
        begin,
        config,
        store.manifest.fingerprint,
        seed=seed,
        device=device,
        identity=identity,
        metric="inner_dice",
        measure=(lambda: {"inner_dice": mean_of(inner, ranks, dice_of)}) if inner else None,
        batches=batches,
        on_epoch=on_epoch,
        ranks=ranks,
        checkpoints=checkpoints,
    )
    _settle(network, parts[0].stored, best)
    return history


def require_inner(config: FinetuneConfig, inner: Sequence[int]) -> None:
    """Refuse a training that has no inner volume where one is to decide.

    Raises:
        ConfigError: as said.
    """
    if config.needs_inner and not inner:
        raise ConfigError(
            "finetune.select, finetune.patience and finetune.inference",
            expected="volumes of the inner split, by which epochs and ways to predict are compared",
            found="none",
            remedy="set labelled.inner to 1 or more, or leave select=last, patience empty and nothing to try",
        )


@dataclass(frozen=True)
class Parts:
    """What is trained with the settings of some epochs.

    Attributes:
        objective: For the engine.
        stored: The module that is measured and stored, part of the objective.
        losses: Where the objective puts the loss of each part of a batch; emptied after each epoch.
    """

    objective: torch.nn.Module
    stored: torch.nn.Module
    losses: list[Tensor]


def train_epochs(
    begin: Callable[[FinetuneConfig], Parts],
    config: FinetuneConfig,
    fingerprint: str,
    *,
    seed: int,
    device: torch.device,
    identity: Mapping[str, str],
    metric: str,
    measure: Callable[[], Mapping[str, float]] | None,
    batches: Callable[[Engine, FinetuneConfig], AbstractContextManager[Iterator[ViewBatch]]],
    on_epoch: OnEpoch,
    ranks: Collectives,
    checkpoints: Checkpoints | None,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train an objective in place, epoch by epoch, and go on where a checkpoint is.

    Args:
        begin: Makes what is trained, of settings without a schedule; again where a schedule changes them.
        config: Settings.
        fingerprint: Of the manifest.
        seed: Seed of the engine.
        device: Where to train.
        identity: What a checkpoint must agree with beside settings and manifest.
        metric: What `measure` gives that decides on epochs; larger is better.
        measure: The inner metrics at the end of an epoch; None without inner volumes.
        batches: Views from the step at which the engine stands, as some settings have them.
        on_epoch: See `train_segmenter`, like the others.
        ranks: The ranks.
        checkpoints: Where the state is kept.

    Returns:
        Each epoch's metrics, and the tensors of `Parts.stored` in the best epoch; none where the last is kept.

    Raises:
        ConfigError: the checkpoint is of another training.
        NonFiniteError: names step and samples.
    """

    def engine_of(stage: FinetuneConfig) -> tuple[Parts, Engine]:
        made = begin(stage)
        return made, Engine(made.objective, stage.engine(seed), collectives=ranks, device=device)

    identity = {"fingerprint": fingerprint, **identity}
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    stage = config.at(1)
    if checkpoints is None or (folder := checkpoints.newest()) is None:
        parts, engine = engine_of(stage)
    else:
        state, meta = checkpoint.load(folder)
        done = len(meta["history"])
        checkpoint.require_same(meta, allow=False, **identity, config_digest=digest(config.begun(done)))
        stage = config.at(done)
        parts, engine = engine_of(stage)
        engine.load_state_dict(state)
        best, history = state["best"], list(meta["history"])
        for epoch, metrics in enumerate(history, 1):
            on_epoch(epoch, dict(metrics))

    def end_epoch(step: int, state: dict[str, Any]) -> None:
        metrics = {"loss": float(ranks.mean(torch.stack(parts.losses).mean()))}
        parts.losses.clear()
        if measure is not None:
            metrics |= measure()
        history.append(metrics)
        epochs = len(history)
        if config.select == "best" and best_epoch(history, metric) == epochs:
            best.update({key: tensor.detach().cpu().clone() for key, tensor in parts.stored.state_dict().items()})
        engine.stopping = engine.stopping or _is_over(history, config, metric)
        if checkpoints is not None and ranks.rank == 0:
            last = engine.stopping or step == config.steps
            own = {**identity, "config_digest": digest(config.begun(epochs)), "history": history}
            checkpoints.save({**state, "best": best}, own, last=last)
        engine.stopping = engine.stopping or any(change.epoch == epochs + 1 for change in config.schedule)
        on_epoch(epochs, dict(metrics))

    while len(history) < config.epochs and not _is_over(history, config, metric):
        ahead = config.at(len(history) + 1)
        if ahead != stage:
            stage, state_before = ahead, engine.state_dict()
            parts, engine = engine_of(stage)
            engine.load_state_dict(state_before, allow_change=True)
        with batches(engine, stage) as views:
            fit(engine, views, report=lambda _step, _metrics: None, save=end_epoch)
    return history, best


def best_epoch(history: Sequence[Mapping[str, float]], metric: str = "inner_dice") -> int:
    """The first epoch with the largest inner metric, counted from 1."""
    scores = [metrics[metric] for metrics in history]
    return scores.index(max(scores)) + 1


def _is_over(history: Sequence[Mapping[str, float]], config: FinetuneConfig, metric: str) -> bool:
    """Whether the inner metric has stood still for as long as it may."""
    if config.patience is None or not history:
        return False
    return len(history) - best_epoch(history, metric) >= config.patience


def mean_of(inner: Sequence[int], ranks: Collectives, score_of: Callable[[int], float]) -> float:
    """Mean over the inner volumes, each measured by one rank."""
    scores = torch.zeros(len(inner), dtype=torch.float64)
    for place in range(ranks.rank, len(inner), ranks.world):
        scores[place] = score_of(inner[place])
    return float(ranks.sum(scores).mean())


@torch.no_grad()
def _settle(network: Backbone, stored: torch.nn.Module, best: Mapping[str, Tensor]) -> None:
    """Leave in the network what was measured: its average, and of the best epoch where one was chosen."""
    final = best or stored.state_dict()
    for key, tensor in network.net.state_dict().items():
        tensor.copy_(final[key])


def _stream_spec(
    config: FinetuneConfig, seed: int, crop_DHW: tuple[int, int, int], train: tuple[int, ...], label: str
) -> StreamSpec:
    return StreamSpec(
        seed=seed,
        global_batch=config.batch,
        crop_DHW=crop_DHW,
        lanes=config.batch,
        crops_per_visit=1,
        indices=train,
        label=label,
        foreground=1.0,
        class_balance=config.class_balance,
        class_draw=config.class_draw,
    )
