"""Fine-tuning as a Ray job: `python -m jobs.finetune CONFIG [key=value ...]`.

Each start with each seed is one task. Every test case is scored, every training is a child run in MLflow, and one
segmenter, chosen before any test score exists, is registered. Each training's result is kept as it ends, so the same
name goes on with those that are missing.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from jobs import driver as entry
from jobs.configs import FinetuneJobConfig, LabelledConfig
from ssl_core.config import parse, resolved
from ssl_core.downstream.finetune import FinetuneConfig
from storage.errors import ConfigError
from storage.objects import join, open_store


@dataclasses.dataclass
class Trained:
    """A trained segmenter and everything needed to score and bundle it."""

    network: Any
    store: Any
    subjects: Any
    labels: dict[int, str]
    encoder: Any
    history: list[dict[str, float]]
    device: Any


def train_once(
    labelled: LabelledConfig,
    settings: FinetuneConfig,
    *,
    start: str,
    seed: int,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda _epoch, _metrics: None,
    like: str,
    gpu: bool = False,
) -> Trained:
    """One training in this process.

    Args:
        labelled: The subjects.
        settings: How to train.
        start: Model URI of an encoder, or `none`.
        seed: Seed of weights, crops and augmentations.
        on_epoch: Hears each epoch's metrics.
        like: Encoder whose network and preprocessing are used when `start` is `none`.
        gpu: Whether to train on a GPU.
    """
    import torch

    from jobs import labelled as split
    from jobs.tracking import bundles as bundling
    from ssl_core.downstream.finetune import Start, build_segmenter, label_values, train_segmenter
    from storage.format.manifest import Manifest
    from storage.reading.volume_store import VolumeStore

    entry.quiet()
    torch.manual_seed(seed)
    device = device_for(gpu)
    manifest = Manifest.open(labelled.data, labelled.fingerprint)
    subjects = split.draw(manifest, labelled)
    store = VolumeStore(labelled.data, manifest)
    encoder = bundling.pull_encoder(like if start == "none" else start)
    # Of all subjects: a class that the few training volumes happen to lack is missed in the others, not left unscored.
    everyone = (*subjects.train, *subjects.inner, *subjects.test)
    values = label_values(store, everyone, labelled.label)
    labels = split.value_names(manifest, labelled.label, values)
    network = build_segmenter(
        encoder.backbone,
        encoder.arguments,
        len(labels) + 1,
        seed,
        None if start == "none" else Start(start, encoder.weights),
    )
    history = train_segmenter(
        network,
        settings,
        store,
        train=subjects.train,
        inner=subjects.inner,
        label=labelled.label,
        labels=labels,
        policy=encoder.intensity,
        pretrained=start != "none",
        seed=seed,
        device=device,
        on_epoch=on_epoch,
    )
    return Trained(network, store, subjects, labels, encoder, history, device)


def device_for(gpu: bool) -> Any:
    """Where to train: on a GPU where one was asked for. Ray hides none from tasks that did not ask.

    Raises:
        ConfigError: one was asked for, and torch sees none.
    """
    import torch

    if gpu and not torch.cuda.is_available():
        raise ConfigError(
            "GPUs of a training",
            expected="a build of torch that sees the one that it was given",
            found=f"torch {torch.__version__}, which sees none",
            remedy="install a build with CUDA on the nodes, or ask for 0",
        )
    return torch.device("cuda" if gpu else "cpu")


def one(payload: dict[str, Any], start: str, seed: int) -> dict[str, Any]:
    """Task: train from a start with a seed, score every test case, and write the bundle when it is the chosen one."""
    from ssl_core.downstream.finetune import score_volumes

    config = parse(FinetuneJobConfig, payload["config"])
    began = time.monotonic()
    like = next(uri for uri in config.starts.values() if uri != "none")
    trained = train_once(
        config.labelled,
        config.finetune,
        start=config.starts[start],
        seed=seed,
        like=like,
        gpu=config.gpus_per_run > 0,
    )
    cases = []
    for index, scores in score_volumes(
        trained.network,
        trained.store,
        trained.subjects.test,
        label=config.labelled.label,
        labels=trained.labels,
        policy=trained.encoder.intensity,
        window=config.finetune.patch_DHW,
        tolerance_mm=config.nsd_tolerance_mm,
        device=trained.device,
    ):
        record = trained.store.manifest.record(index)
        for label, s in scores.items():
            row = {
                "start": start,
                "seed": seed,
                "volume_id": record.volume_id,
                "subject": record.subject,
                "label": label,
            }
            cases.append({**row, "dice": s.dice, "hd95_mm": s.hd95_mm, "nsd": s.nsd})
    version = None
    if start == chosen_start(config) and seed == config.seeds[0]:
        from jobs.tracking import bundles as bundling
        from jobs.tracking import models as registry

        with tempfile.TemporaryDirectory(prefix="tomoscale-bundle-") as folder:
            bundle = bundling.write_segmenter(
                config,
                trained,
                Path(folder) / "bundle",
                run_id=payload["run_id"],
                cases=cases,
                parent=config.starts[start],
            )
            version = registry.register(bundle, config.model or config.name, run_id=payload["run_id"])
    trained.store.close()
    return {
        "start": start,
        "seed": seed,
        "history": trained.history,
        "cases": cases,
        "version": version,
        "seconds": time.monotonic() - began,
    }


def chosen_start(config: FinetuneJobConfig) -> str:
    """The start whose first seed is registered: fixed by the configuration, never by a test score."""
    return config.register_start or next(iter(config.starts))


def main(argv: Sequence[str]) -> int:
    """Driver: all starts and seeds, statistics, MLflow, `result.json`."""
    config = entry.load(FinetuneJobConfig, argv, "jobs.finetune")
    import ray

    from jobs.on_ray.session import connect, result_of
    from jobs.pinning import pinned
    from jobs.tracking import runs as tracking

    connect()
    api = tracking.client()
    config = pinned(config)
    run_id = tracking.open_run(api, config.experiment, config.name, "finetune", params=resolved(config), tags={})
    payload = {"config": resolved(config), "run_id": run_id}
    todo = [(start, seed) for seed in config.seeds for start in config.starts]
    kept = open_store(join(config.runs, config.name, "trainings"))
    task = ray.remote(num_cpus=config.cpus_per_run, num_gpus=config.gpus_per_run, max_retries=2)(one)
    running: list[Any] = []
    began = time.monotonic()
    try:
        results = [json.loads(kept.get(key)) for pair in todo if kept.exists(key := _key(*pair))]
        if results:
            print(f"{len(results)} of {len(todo)} trainings were done before", flush=True)
            todo = [pair for pair in todo if pair not in {(r["start"], r["seed"]) for r in results}]
        print(
            f"fine-tuning {config.name}: {len(todo)} trainings, {config.concurrent} at a time; MLflow run {run_id}",
            flush=True,
        )
        while todo or running:
            while todo and len(running) < config.concurrent:
                start, seed = todo.pop(0)
                running.append(task.remote(payload, start, seed))
            done, running = ray.wait(running, num_returns=1)
            result = result_of(done[0])
            _log(api, config, run_id, result)
            kept.put(_key(result["start"], result["seed"]), json.dumps(result).encode())
            results.append(result)
            mean = np.mean([c["dice"] for c in result["cases"]])
            text = f"{result['start']} seed {result['seed']}: test Dice {mean:.3f}, {result['seconds']:.0f} s"
            print(f"{text} ({len(results)}/{len(config.seeds) * len(config.starts)})", flush=True)
        summary = summarise(config, results)
        entry.write_result(config.runs, config.name, {**summary, "run_id": run_id, "seconds": time.monotonic() - began})
    except BaseException as error:
        entry.end_failed(api, run_id, error)
        raise
    entry.end_run(api, run_id, "FINISHED")
    print(summary["test"]["statement"], flush=True)
    return 0


def _key(start: str, seed: int) -> str:
    return f"{quote(start, safe='')}-{seed}.json"


def summarise(config: FinetuneJobConfig, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows by start and label, and the paired test of the first start against the second over test subjects."""
    from ssl_core.downstream.paired_test import compare

    starts = list(config.starts)
    # As configured, not as they happened to end.
    results = sorted(results, key=lambda r: (starts.index(r["start"]), config.seeds.index(r["seed"])))
    cases = [case for result in results for case in result["cases"]]
    rows = []
    for start in starts:
        for label in sorted({c["label"] for c in cases}):
            mine = [c for c in cases if c["start"] == start and c["label"] == label]
            row: dict[str, Any] = {"start": start, "label": label, "seeds": len(config.seeds)}
            row["cases"] = len({c["volume_id"] for c in mine})
            for key, name in (("dice", "dice"), ("hd95_mm", "hd95"), ("nsd", "nsd")):
                values = np.array([c[key] for c in mine])
                row |= {f"{name}_mean": float(values.mean()), f"{name}_sd": float(values.std())}
            rows.append(row)
    test: dict[str, Any] = {"statement": "One start only: nothing to compare."}
    if len(starts) > 1:
        a, b = starts[:2]
        subjects = sorted({c["subject"] for c in cases})
        mean = {
            s: [
                float(np.mean([c["dice"] for c in cases if c["start"] == s and c["subject"] == who]))
                for who in subjects
            ]
            for s in (a, b)
        }
        test = dataclasses.asdict(compare(np.array(mean[a]), np.array(mean[b]), a=a, b=b, seeds=len(config.seeds)))
    version = next((r["version"] for r in results if r["version"] is not None), None)
    return {
        "rows": rows,
        "cases": cases,
        "test": test,
        "model": config.model or config.name,
        "version": version,
        "registered_start": chosen_start(config),
        "nsd_tolerance_mm": config.nsd_tolerance_mm,
        "runs": [{k: r[k] for k in ("start", "seed", "history", "seconds")} for r in results],
    }


def _log(api: Any, config: FinetuneJobConfig, run_id: str, result: dict[str, Any]) -> None:
    from jobs.tracking import runs as tracking

    child = tracking.open_run(
        api,
        config.experiment,
        f"{config.name}-{result['start']}-{result['seed']}",
        "finetune-seed",
        params={"start": config.starts[result["start"]], "seed": result["seed"]},
        tags={},
        parent=run_id,
    )
    points = [tracking.point(i + 1, m) for i, m in enumerate(result["history"])]
    means = {k: float(np.mean([c[k] for c in result["cases"]])) for k in ("dice", "hd95_mm", "nsd")}
    points.append(tracking.point(len(points) + 1, {f"test/{k}": v for k, v in means.items()}))
    tracking.backfill(api, child, points)
    entry.end_run(api, child, "FINISHED")


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
