"""`tomoscale bench nnunet`: a training of this project from random weights, then nnU-Net's in as many seconds.

Both have the same volumes, at the spacing of the store, the same cores, and are scored by the same code on the same
test volumes. nnU-Net plans for itself, preprocesses and predicts as it does, and only its training is timed. One seed
of each: a difference of a few thousandths shows nothing.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jobs import labelled as split
from jobs.bench.measure import machine
from jobs.bench.nnunet.config import CompareConfig
from jobs.bench.nnunet.nnunet import NnUnet
from jobs.finetune.training import score_test, train_from
from jobs.output import table
from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.config import resolved
from ssl_core.downstream.finetune import label_values
from ssl_core.downstream.scores import METRICS, CaseScore, mean_scores, score_case
from ssl_core.networks.registry import build
from storage.format.manifest import Manifest
from storage.reading.volume_store import VolumeStore

Say = Callable[[str], None]


def bench_nnunet(config: CompareConfig, python: Path, *, say: Say = print) -> dict[str, Any]:
    """Train both and score both.

    Args:
        config: What to train.
        python: Interpreter of an environment with nnU-Net.
        say: Hears progress.

    Returns:
        JSON-able: `machine`, `config`, `data`, `nnunet` (its cut configuration), and `rows` of both, each with `cases`.

    Raises:
        ConfigError: the volumes or settings do not fit.
        StackError: nnU-Net failed.
    """
    manifest = Manifest.open(config.labelled.data, config.labelled.fingerprint)
    subjects = split.draw(manifest, config.labelled)
    train = sorted((*subjects.train, *subjects.inner))
    with (
        tempfile.TemporaryDirectory(prefix="tomoscale-nnunet-") as folder,
        VolumeStore(config.labelled.data, manifest) as store,
    ):
        found = label_values(store, (*train, *subjects.test), config.labelled.label)
        names = split.value_names(manifest, config.labelled.label, found)
        nnunet = NnUnet(python, Path(folder) / "nnunet", say)
        nnunet.write_cases(store, train, subjects.test, config.labelled.label, _numbers(names))
        cut = nnunet.plan(config.nnunet)  # a plan that cannot be is known before the first minutes of training
        own = _own(config, Path(folder) / "network", say)
        timed = nnunet.train(own["seconds"])
        nnunet.predict()
        cases = []
        for index in subjects.test:
            record = manifest.record(index)
            truth_DHW = store.read_volume(record.volume_id, label=config.labelled.label)[0]
            scores = score_case(
                nnunet.mask(index, _numbers(names)),
                truth_DHW,
                labels=names,
                spacing_mm=record.spacing_mm,
                tolerance_mm=config.tolerance_mm,
            )
            cases += [CaseScore(record.volume_id, record.subject, name, s) for name, s in scores.items()]
    return {
        "machine": machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "config": resolved(config),
        "data": {
            "name": manifest.dataset.get("name", ""),
            "fingerprint": manifest.fingerprint,
            "train": len(train),
            "test": len(subjects.test),
            "labels": list(names.values()),
        },
        "nnunet": cut,
        "rows": [own, {"name": "nnU-Net", **timed, **_summary(cases)}],
    }


def _numbers(names: dict[int, str]) -> dict[int, int]:
    """Label values from 1 on without gaps, as nnU-Net wants them."""
    return {value: number for number, value in enumerate(sorted(names), 1)}


def _own(config: CompareConfig, place: Path, say: Say) -> dict[str, Any]:
    """The training of this project, and its scores."""
    network = build(config.backbone.name, **config.backbone.arguments)
    facts = BundleFacts(name="untrained", patch_DHW=config.finetune.patch_DHW, intensity=config.intensity)
    like = str(write_bundle(place, "encoder", network, facts))
    began = time.monotonic()

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        say(f"tomoscale: epoch {epoch} of {config.finetune.epochs}, {time.monotonic() - began:.0f} s: {shown}")

    trained = train_from("none", config.labelled, config.finetune, seed=config.seed, like=like, on_epoch=on_epoch)
    seconds = time.monotonic() - began
    with trained.store:
        cases = list(score_test(trained, config.labelled, config.finetune, config.tolerance_mm))
    steps = config.finetune.epochs * config.finetune.steps_per_epoch
    return {"name": "tomoscale", "steps": steps, "seconds": seconds, **_summary(cases)}


def _summary(cases: list[CaseScore]) -> dict[str, Any]:
    labels = list(dict.fromkeys(case.label for case in cases))
    means = {label: mean_scores([case for case in cases if case.label == label]) for label in labels}
    return {
        "mean_dice": sum(scores.dice for scores in means.values()) / len(means),
        "means": {label: {metric.name: scores.of(metric) for metric in METRICS} for label, scores in means.items()},
        "cases": [
            {"volume_id": c.volume_id, "label": c.label, **{m.name: c.scores.of(m) for m in METRICS}} for c in cases
        ],
    }


def format_nnunet(result: dict[str, Any]) -> str:
    """The result for a person."""
    tolerance_mm = result["config"]["tolerance_mm"]
    header = ("", "steps", "training", "label", *(metric.heading(tolerance_mm) for metric in METRICS))
    rows: list[tuple[object, ...]] = []
    for row in result["rows"]:
        first: tuple[object, ...] = (row["name"], row["steps"], f"{row['seconds']:.0f} s")
        for label, means in row["means"].items():
            rows.append((*first, label, *means.values()))
            first = ("", "", "")
        rows.append(("", "", "", "mean", row["mean_dice"], *[""] * (len(METRICS) - 1)))
    return table(header, rows)
