"""From checkpoints to bundles and back: what a job registers and what the next one starts from."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from jobs.configs import FinetuneJobConfig, PretrainConfig
from jobs.tracking.encoder import bundle_of
from jobs.tracking.runs import Point
from ssl_core.bundle import DECODER, WEIGHTS, write_bundle
from ssl_core.bundle_card import BundleFacts, stored_spacing, training_data
from ssl_core.config import digest, parse
from ssl_core.downstream.finetune import TrainedSegmenter
from ssl_core.downstream.heads.comparison import HeadTraining, measure_of, subject_scores
from ssl_core.downstream.heads.training import TrainedHead
from ssl_core.downstream.scores import CaseScore
from ssl_core.methods.base import method_class
from ssl_core.networks import Backbone, build
from ssl_core.networks.weights import load_exact
from ssl_core.portable.predictor import check_bundle
from ssl_core.portable.safetensors import read_safetensors
from ssl_core.train import checkpoint
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import ConfigError, RefusedInput
from storage.format.manifest import Manifest


@dataclass(frozen=True)
class EncoderBundle:
    """What fine-tuning takes from an encoder's bundle.

    Attributes:
        backbone: Registered backbone name.
        arguments: Its arguments.
        weights: Encoder tensors under the stock names.
        intensity: The policy it was trained with.
        lineage: Where it comes from.
        rest: What else the bundle holds of the network: a decoder that was trained with the encoder, or the rest of a
            segmenter; nothing in bundles of an encoder alone.
        modules: Of each encoder level, finest first, the module of the stock network whose output it is; empty where
            there is none.
    """

    backbone: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    intensity: IntensityPolicy
    lineage: dict[str, str]
    rest: dict[str, Tensor] = field(default_factory=dict)
    modules: tuple[str, ...] = ()


def write_encoder(config: PretrainConfig, directory: Path, target: Path, *, run_id: str) -> Path:
    """Bundle of the encoder in a pre-training checkpoint, with the decoder where the method trained it.

    Every tensor of the method must match.
    """
    state, meta = checkpoint.load(directory)
    method = method_class(config.method_name)(
        config.method_config, build(config.backbone.name, **config.backbone.arguments)
    )
    load_exact(method, state["method"])
    views = method_class(config.method_name).view_spec(config.method_config)
    lineage = {
        "method": config.method_name,
        "data": config.data,
        "data_fingerprint": meta["fingerprint"],
        "config_digest": digest(config),
        "samples_digest": meta["samples"],
        "steps": str(meta["step"]),
        "run_id": run_id,
    }
    if config.init is not None:
        lineage["parent"] = config.init
    last = Point.from_json(meta["journal"][-1]).metrics
    manifest = Manifest.open(config.data, meta["fingerprint"])
    records = [record for record in manifest.records() if record.split == config.stream.split]
    notes: tuple[str, ...] = ()
    try:
        spacing_mm, interpolation = stored_spacing(records)
    except ConfigError as error:  # no reason to lose the encoder
        spacing_mm, interpolation = None, "linear"
        notes = (f"Some of its training volumes were resampled; their spacings differ: {error.found}.",)
    decoder = _trains_decoder(method.encoder())
    if decoder:
        notes += (f"{DECODER} is the decoder that was trained with it: fine-tuning takes it with transfer.",)
    facts = BundleFacts(
        name=config.model_name,
        patch_DHW=views.roles[0].size_DHW,
        intensity=config.intensity,
        spacing_mm=spacing_mm,
        interpolation=interpolation,
        training=training_data(records),
        notes=notes,
        lineage=lineage,
        metrics={
            f"pre-training {k}": v
            for k, v in last.items()
            if k.startswith(("loss", "monitor", "probe")) and math.isfinite(v)
        },
    )
    return write_bundle(target, "encoder", method.encoder(), facts, decoder=decoder)


def _trains_decoder(backbone: Backbone) -> bool:
    """Whether the method that has this backbone trains all of its decoder."""
    parameters = dict(backbone.net.named_parameters())
    own = [parameters[key] for key in backbone.decoder_keys() if key in parameters]
    return bool(own) and all(parameter.requires_grad for parameter in own)


def write_segmenter(
    config: FinetuneJobConfig,
    trained: TrainedSegmenter,
    target: Path,
    *,
    run_id: str,
    cases: Sequence[CaseScore],
    parent: str,
) -> Path:
    """Bundle of a fine-tuned segmenter, with its Dice of each test subject for promotions to compare."""
    subjects = sorted({c.subject for c in cases})
    labels = " ".join(map(str, trained.labels))
    facts = replace(
        _facts(config, trained, "labelled volumes", run_id=run_id, parent=parent),
        labels=((0, "background"), *trained.labels.items()),
        metrics={"test Dice": fmean(c.scores.dice for c in cases)},
        inference=trained.inference,
        # Of what, too: another label map on the same volumes is another question. A case is a subject, since two
        # volumes of one are not independent.
        evaluation={
            "split": f"{trained.store.manifest.fingerprint} test, {config.labelled.label} {labels}",
            "measure": "Dice",
            "cases": {s: fmean(c.scores.dice for c in cases if c.subject == s) for s in subjects},
        },
    )
    return write_bundle(target, "segmenter", trained.network, facts)


def write_head(
    config: FinetuneJobConfig,
    trained: TrainedHead,
    target: Path,
    *,
    run_id: str,
    training: HeadTraining,
    parent: str,
) -> Path:
    """Bundle of a classifier or a regressor, with its score of each test subject for promotions to compare."""
    learned = trained.target
    what = f"classes {', '.join(learned.classes)}" if learned.classes else "a number"
    facts = replace(
        _facts(config, trained, "volumes", run_id=run_id, parent=parent),
        metrics={f"test {name}": value for name, value in training.scores.items() if value is not None},
        head=trained.head,
        evaluation={
            "split": f"{trained.store.manifest.fingerprint} test, column {learned.column}: {what}",
            "measure": measure_of(learned.task, learned.column),
            "cases": subject_scores(training),
        },
    )
    return write_bundle(target, "classifier" if learned.classes else "regressor", trained.network.backbone, facts)


def _facts(
    config: FinetuneJobConfig, trained: TrainedSegmenter | TrainedHead, volumes: str, *, run_id: str, parent: str
) -> BundleFacts:
    """What the bundles of all tasks of fine-tuning say: where the model comes from, and what it was trained on."""
    manifest, subjects = trained.store.manifest, trained.subjects
    records = [manifest.record(i) for i in (*subjects.train, *subjects.inner)]
    spacing_mm, interpolation = stored_spacing(records)
    return BundleFacts(
        name=config.model or config.name,
        patch_DHW=config.finetune.patch_DHW,
        intensity=trained.intensity,
        lineage={
            "parent": parent,
            "data": config.labelled.data,
            "data_fingerprint": manifest.fingerprint,
            "config_digest": digest(config),
            "run_id": run_id,
        },
        spacing_mm=spacing_mm,
        interpolation=interpolation,
        training=training_data(records),
        notes=(
            f"Fine-tuned on {len(subjects.train)} {volumes}, tested on {len(subjects.test)}.",
            *trained.notes,
        ),
    )


def read_encoder(bundle: Path) -> EncoderBundle:
    """The encoder in a bundle, of any kind.

    Raises:
        RefusedInput: the bundle is damaged or lacks a tensor.
    """
    card = check_bundle(bundle)
    architecture = json.loads((bundle / "architecture.json").read_text(encoding="utf-8"))
    plan = json.loads((bundle / "preprocess.json").read_text(encoding="utf-8"))
    weights = read_safetensors(bundle / WEIGHTS)
    missing = [key for key in architecture["encoder_keys"] if key not in weights]
    if missing:
        raise RefusedInput(
            str(bundle / WEIGHTS),
            expected=f"all {len(architecture['encoder_keys'])} tensors of the encoder",
            found=f"{len(missing)} missing, the first: {missing[0]}",
            remedy="pull it again, or train it again",
        )
    if DECODER in card["files"]:
        weights |= read_safetensors(bundle / DECODER)
    encoder = set(architecture["encoder_keys"])
    return EncoderBundle(
        backbone=architecture["backbone"],
        arguments=architecture["backbone_arguments"],
        weights={key: weights[key] for key in architecture["encoder_keys"]},
        intensity=parse(IntensityPolicy, plan["intensity"], f"{bundle / 'preprocess.json'}: intensity"),
        lineage=card["lineage"],
        rest={key: tensor for key, tensor in weights.items() if key not in encoder},
        modules=tuple(str(level["module"]) for level in architecture["levels"]),
    )


def pull_encoder(uri: str) -> EncoderBundle:
    """The encoder behind a model URI, in a bundle's folder or at the URL of one.

    Raises:
        ConfigError: no URI was given.
    """
    if not uri or uri == "none":
        raise ConfigError(
            "encoder",
            expected="a model URI such as models:/NAME@candidate",
            found=repr(uri),
            remedy="`tomoscale models list` shows what there is",
        )
    with bundle_of(uri) as root:
        return read_encoder(root)
