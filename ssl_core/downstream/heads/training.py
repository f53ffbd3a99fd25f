"""Training of a head under the loop of fine-tuning, and what it makes of stored volumes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_core.distributed import Collectives, Single
from ssl_core.downstream.finetune import Checkpoints, OnEpoch, Parts, Subjects, mean_of, require_inner, train_epochs
from ssl_core.downstream.heads.network import HeadNetwork, WholeVolume, probe_batches
from ssl_core.downstream.heads.scores import Outcome, outcome
from ssl_core.downstream.heads.targets import Target
from ssl_core.downstream.measure import module_of
from ssl_core.downstream.settings import FinetuneConfig
from ssl_core.portable.head.pooling import volume_features
from ssl_core.portable.head.settings import Head
from ssl_core.train.engine import Engine
from ssl_core.views.intensity import IntensityPolicy, normalise_array
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import ViewBatch
from storage.reading.slabs import StoredSlabs
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream
from storage.stream.plan import StreamSpec

METRICS = {"classification": "inner_log_likelihood", "regression": "inner_negative_mae"}
"""The inner metric of each task; larger is better."""
_LEAST_SD = 1e-6
"""Of a feature over the training volumes, below which it is taken for constant and left unscaled; our choice."""


@dataclass(frozen=True)
class TrainedHead:
    """A trained head and everything that scoring and bundling it takes.

    Attributes:
        network: Encoder and linear layer.
        head: What a bundle keeps of the linear layer.
        store: Where its volumes are; whoever asked for the training closes it.
        subjects: Volumes by use.
        target: What was learned.
        intensity: Policy of its encoder.
        history: Metrics of each epoch.
        device: Where it was trained.
        notes: What a person who uses it should know of how it began.
    """

    network: HeadNetwork
    head: Head
    store: VolumeStore
    subjects: Subjects
    target: Target
    intensity: IntensityPolicy
    history: tuple[Mapping[str, float], ...]
    device: torch.device
    notes: tuple[str, ...] = ()


def train_head(
    network: HeadNetwork,
    config: FinetuneConfig,
    store: VolumeStore,
    *,
    train: Sequence[int],
    inner: Sequence[int],
    target: Target,
    policy: IntensityPolicy,
    pretrained: bool,
    seed: int,
    device: torch.device,
    on_epoch: OnEpoch = lambda _epoch, _metrics: None,
    collectives: Collectives | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[dict[str, float]]:
    """Train in place and return each epoch's metrics: `loss`, and with inner volumes the one of `METRICS`.

    Args:
        network: From `build_head`.
        target: What is learned.
        config: Settings; the others are those of `ssl_core.downstream.finetune.train_segmenter`.

    Raises:
        ConfigError: no inner volume where one is to decide, or the checkpoint is of another training.
        NonFiniteError: names step and samples.
    """
    require_inner(config, inner)
    ranks: Collectives = Single() if collectives is None else collectives
    probe = config.head.frozen

    def raw_features(index: int) -> Tensor:
        return features_of(network, store, index, policy=policy, window=config.patch_DHW, device=device)

    frozen = {index: raw_features(index) for index in (*train, *inner)} if probe else {}
    objective = WholeVolume(network, config, target, train, pretrained)
    centre_E, spread_E = _standard(torch.stack([frozen[index] for index in train])) if probe else (None, None)

    def score_of(index: int) -> float:
        if centre_E is not None and spread_E is not None:
            features_E = (frozen[index] - centre_E) / spread_E
        else:
            features_E = raw_features(index)
        outputs_K = network.head(target).outputs(features_E[None])[0]
        truth = target.value_of[index]
        if target.classes:
            return float(torch.log_softmax(outputs_K, 0)[int(truth)])
        return -abs(float(outputs_K[0]) * target.sd + target.mean - truth)

    @contextmanager
    def batches(engine: Engine, _settings: FinetuneConfig) -> Iterator[Iterator[ViewBatch]]:
        if centre_E is not None and spread_E is not None:
            table_NE = torch.stack([(frozen[index] - centre_E) / spread_E for index in train])
            table_NE = table_NE.to(device=device, dtype=engine.dtype)
            yield probe_batches(table_NE, train, config, ranks, seed=seed, step=engine.step_done)
            return
        views = config.views(None, target.classes)
        spec = StreamSpec(
            seed=seed,
            global_batch=config.batch,
            crop_DHW=host_size(views),
            lanes=config.batch,
            crops_per_visit=1,
            indices=tuple(train),
            foreground=1.0,
        )
        start = engine.step_done * config.batch
        with CropStream(store, spec, rank=ranks.rank, world=ranks.world, start=start, prefetch=2, threads=1) as stream:
            yield (
                make_views(batch, views, seed=seed, policy=policy, device=device, dtype=engine.dtype)
                for batch in stream
            )

    metric = METRICS[config.task]
    of_task = (target.column, target.classes, target.mean, target.sd, [target.value_of[i] for i in (*train, *inner)])
    history, best = train_epochs(
        lambda _settings: Parts(objective, objective.stored, objective.losses),
        config,
        store.manifest.fingerprint,
        seed=seed,
        device=device,
        identity={"training": repr((tuple(train), tuple(inner), *of_task, pretrained, seed))},
        metric=metric,
        measure=(lambda: {metric: mean_of(inner, ranks, score_of)}) if inner else None,
        batches=batches,
        on_epoch=on_epoch,
        ranks=ranks,
        checkpoints=checkpoints,
    )
    with torch.no_grad():
        for key, tensor in objective.stored.state_dict().items():
            tensor.copy_(best.get(key, tensor))
        if centre_E is not None and spread_E is not None:
            _fold(network.linear, centre_E, spread_E)
    return history


def features_of(
    network: HeadNetwork,
    store: VolumeStore,
    index: int,
    *,
    policy: IntensityPolicy,
    window: tuple[int, int, int],
    device: torch.device,
) -> Tensor:
    """Pooled features of a stored volume, (E,) float64 on the CPU, as the bundle computes them."""
    record = store.manifest.record(index)
    backbone = module_of(network.backbone).to(device)
    training = backbone.training
    backbone.eval()
    kind = next(backbone.parameters()).dtype
    values = StoredSlabs(store, record.volume_id, np.float32)
    features_E = volume_features(
        lambda x_BCDHW: network.features(x_BCDHW.to(kind)),
        lambda start, stop: normalise_array(values.read(start, stop), record.stats, policy),
        record.shape_DHW,
        normalise_array(np.array([channel["min"] for channel in record.stats]), record.stats, policy),
        window,
        device=device,
    )
    backbone.train(training)
    return features_E


def outcomes_of(trained: TrainedHead, indices: Sequence[int], window: tuple[int, int, int]) -> tuple[Outcome, ...]:
    """What the model says of stored volumes, beside what they are; the store is open."""
    outcomes = []
    for index in indices:
        record = trained.store.manifest.record(index)
        features_E = features_of(
            trained.network, trained.store, index, policy=trained.intensity, window=window, device=trained.device
        )
        row = trained.head.row(trained.head.outputs(features_E[None])[0])
        outcomes.append(outcome(record.volume_id, record.subject, trained.target, index, row))
    return tuple(outcomes)


def _standard(features_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature; 1 where it does not vary."""
    sd_E = features_NE.std(0, correction=0)
    return features_NE.mean(0), torch.where(sd_E > _LEAST_SD, sd_E, torch.ones_like(sd_E))


def _fold(linear: torch.nn.Linear, centre_E: Tensor, spread_E: Tensor) -> None:
    """Let a layer that was trained on standardised features take them as they are."""
    weight_KE = linear.weight.double().cpu() / spread_E
    linear.bias.copy_(linear.bias.double().cpu() - weight_KE @ centre_E)
    linear.weight.copy_(weight_KE)
