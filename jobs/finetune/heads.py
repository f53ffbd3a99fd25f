"""Classification and regression in the job of fine-tuning: one training, its bundle, and what all come to."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import labelled as split
from jobs.configs import FinetuneJobConfig, LabelledConfig
from jobs.finetune.training import open_training
from jobs.tracking import bundles, registration
from ssl_core.downstream.finetune import Checkpoints, FinetuneConfig
from ssl_core.downstream.heads.comparison import HeadComparison, HeadTraining, measure_of, paired_test_of
from ssl_core.downstream.heads.network import build_head, require_modules
from ssl_core.downstream.heads.training import TrainedHead, outcomes_of, train_head
from ssl_core.portable.inference.settings import sided
from storage.objects import join
from storage.reading.volume_store import VolumeStore


def train_head_from(
    start: str,
    labelled: LabelledConfig,
    settings: FinetuneConfig,
    *,
    seed: int,
    like: str,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda _epoch, _metrics: None,
    gpu: bool = False,
    checkpoints: Checkpoints | None = None,
) -> TrainedHead:
    """One training in this process; arguments as of `jobs.finetune.training.train_from`.

    Raises:
        ConfigError: the column cannot be learned, or the encoder lacks levels that are to be pooled.
    """
    opening = open_training(start, labelled, settings, seed=seed, like=like, gpu=gpu)
    subjects, encoder, begun = opening.subjects, opening.encoder, opening.weights
    target = split.target(opening.manifest, labelled, settings.task, subjects.train)
    notes = list(begun.notes)
    if settings.flip[2] and not settings.head.frozen and (name := sided(target.classes)):
        notes.append(f"No view was mirrored along W, left to right, since the class {name!r} names a side.")
    if settings.head.frozen:
        whose = "random weights" if start == "none" else "the pre-trained encoder"
        notes.append(f"A linear probe: its features are those of {whose}, and were not trained.")
    for line in notes[len(begun.notes) :]:
        print(line, flush=True)
    require_modules(begun.model, encoder.modules, settings.head.levels)
    outputs = len(target.classes) or 1
    network = build_head(encoder.backbone, begun.arguments, settings.head.levels, outputs, seed, begun.start)
    store = VolumeStore(labelled.data, opening.manifest)
    history = train_head(
        network,
        settings,
        store,
        train=subjects.train,
        inner=subjects.inner,
        target=target,
        policy=encoder.intensity,
        pretrained=start != "none",
        seed=seed,
        device=opening.device,
        on_epoch=on_epoch,
        checkpoints=checkpoints,
    )
    return TrainedHead(
        network,
        network.head(target),
        store,
        subjects,
        target,
        encoder.intensity,
        tuple(history),
        opening.device,
        tuple(notes),
    )


@dataclass(frozen=True)
class Which:
    """One training of a job.

    Attributes:
        start: Name of its start.
        seed: Its seed.
        draw: Seed of its draw; None where the job has one.
        is_registered: Whether its model is the one that is registered.
    """

    start: str
    seed: int
    draw: int | None
    is_registered: bool


def trained_and_stored(config: FinetuneJobConfig, run_id: str, which: Which, checkpoints: Checkpoints) -> HeadTraining:
    """Train, score every test volume, and store the model when it is the one to register.

    Args:
        config: The job.
        run_id: MLflow run of the job.
        which: Which training.
        checkpoints: Of this training.
    """
    began = time.monotonic()
    labelled = config.labelled if which.draw is None else config.labelled.of_draw(which.draw)
    trained = train_head_from(
        config.starts[which.start],
        labelled,
        config.finetune,
        seed=which.seed,
        like=next(uri for uri in config.starts.values() if uri != "none"),
        gpu=config.gpus_per_run > 0,
        checkpoints=checkpoints,
    )
    with trained.store:
        cases = outcomes_of(trained, trained.subjects.test, config.finetune.patch_DHW)
        seconds = time.monotonic() - began
        training = HeadTraining(
            which.start, which.seed, trained.history, cases, None, seconds, which.draw, trained.target.classes
        )
        if which.is_registered:
            with tempfile.TemporaryDirectory(prefix="tomoscale-bundle-") as folder:
                target = Path(folder) / "bundle"
                parent = config.starts[which.start]
                bundle = bundles.write_head(config, trained, target, run_id=run_id, training=training, parent=parent)
                registration.store_bundle(bundle, join(config.runs, config.name))
    return training


def compared_heads(
    config: FinetuneJobConfig, trainings: Sequence[HeadTraining], *, registered: str, run_id: str, seconds: float
) -> HeadComparison:
    """What all trainings of a job come to.

    Args:
        config: The job.
        trainings: One for each start, seed and draw, in any order.
        registered: The start whose first seed is registered.
        run_id: MLflow run of the job.
        seconds: Wall time of the job.
    """
    starts, draws = list(config.starts), [None, *config.labelled.draws]
    in_order = sorted(trainings, key=lambda t: (starts.index(t.start), draws.index(t.draw), config.seeds.index(t.seed)))
    task, column = config.finetune.task, str(config.labelled.column)
    measure = measure_of(task, column)
    return HeadComparison(
        task=task,
        column=column,
        trainings=tuple(in_order),
        starts=tuple(starts),
        test=paired_test_of(in_order, starts, measure, config.labelled.subjects),
        measure=measure,
        model=config.model or config.name,
        version=next((t.version for t in in_order if t.version is not None), None),
        registered_start=registered,
        run_id=run_id,
        seconds=seconds,
    )
