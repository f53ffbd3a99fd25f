"""Do the methods learn? Short pre-training of each on a CPU, then a linear read-out beside that of random features.

Every row starts from the same weights as the random features of its seed, sees the same volumes for as many steps, and
is read out at the same voxels of the same subjects (`jobs.bench.learning.voxel_probe`). The labelled subjects that the
read-out is fitted on are of the training split, those it is scored on of another, which pre-training never saw.

This is evidence that objectives work as they are written, at a size where a fault shows within minutes. It is no
ranking: networks, views, batches and runs are far below what any of the papers used.
"""

import copy
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ssl_core.methods  # noqa: F401  registers them
from jobs.bench.learning.arms import FULL, NORMS, Arm, Size, arms, config_of, queue_of, spec_of
from jobs.bench.learning.rows import RANDOM, Run, ablations, summary
from jobs.bench.learning.voxel_probe import Case, evaluate, fit, load_case
from jobs.bench.measure import machine
from ssl_core.config import parse, resolved
from ssl_core.downstream.finetune import label_values
from ssl_core.methods.base import LossTerms, StepContext, method_class
from ssl_core.monitor.collapse import CollapseWarning, probe
from ssl_core.networks.pyramid import Pyramid
from ssl_core.networks.registry import build
from ssl_core.superpixels.segment import of_volume
from ssl_core.superpixels.settings import Superpixels
from ssl_core.train.engine import Engine, EngineConfig
from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import ViewBatch
from storage.datasets import simulated as cohort
from storage.errors import ConfigError
from storage.ingest import derived_maps as derive
from storage.ingest import pipeline as ingest
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream, HostBatch
from storage.stream.plan import StreamSpec

LABEL = "label"
FIXED_BATCHES = 16
"""Of views on which the loss before and after is compared."""

FIXED_SEED = 10**6
"""Added to the seed of the crops, so that those of the fixed views are not those of the steps."""

POLICY = IntensityPolicy.model_validate({})


@dataclass(frozen=True)
class Data:
    """An ingested data set and the subjects of the read-out."""

    store: VolumeStore
    simulated: bool
    fitted: list[Case]
    scored: dict[str, Case]
    classes: int


def bench_learn(
    methods: Sequence[str] = (),
    size: Size = FULL,
    *,
    part: str = "test",
    overrides: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Pre-train and read out every row with every seed.

    Args:
        methods: See `arms`.
        size: How much.
        part: Split whose subjects are scored: `test`, or `val` to choose settings by.
        overrides: Settings of the methods, to study them.
        say: Hears of each run when it is done.

    Returns:
        JSON-able: `machine`, `data`, `size`, `rows` (see `summary`), `ablations`, and `runs` by row.
    """
    compared = arms(methods, size, overrides)
    began = time.monotonic()
    kinds = {s for arm in compared for s in spec_of(arm).superpixels}
    with dataset(size, part, say, kinds) as data:
        runs: dict[str, list[Run]] = {RANDOM: [], **{arm.name: [] for arm in compared}}
        for seed in size.seeds:
            for arm in (None, *compared):
                run = one_run(arm, data, size, seed)
                runs[RANDOM if arm is None else arm.name].append(run)
                say(_line(RANDOM if arm is None else arm.name, run))
        rows = [summary(name, seeds, runs[RANDOM]) for name, seeds in runs.items()]
        facts = {
            "name": data.store.manifest.dataset.get("name", ""),
            "simulated": data.simulated,
            "pretrained_on": len(data.store.manifest.select(split="train")),
            "fitted": len(data.fitted),
            "scored": sorted(data.scored),
            "part": part,
        }
    return {
        "machine": machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "data": facts,
        "size": asdict(size),
        "settings": {arm.name: resolved(config_of(arm)) for arm in compared},
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
        "ablations": ablations(runs),
        "runs": {name: [asdict(run) for run in seeds] for name, seeds in runs.items()},
    }


def network(size: Size) -> Pyramid:
    """The small network, with fresh weights."""
    levels = len(size.filters)
    strides = (1,) + (2,) * (levels - 1)
    shape = {"filters": size.filters, "strides": strides, "kernel_size": (3,) * levels}
    return build("dynunet", **shape, norm_name=NORMS[size.norm])


def one_run(arm: Arm | None, data: Data, size: Size, seed: int) -> Run:
    """Pre-train (not at all for `None`) from the weights of the seed, and read out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = network(size)
        course = None if arm is None else _pretrain(arm, backbone, data, size, seed)
    backbone.eval()
    read_out = fit(backbone, data.fitted, data.classes)
    scored = evaluate(backbone, read_out, list(data.scored.values()))
    dice = {case: round(value, 5) for case, value in zip(data.scored, scored, strict=True)}
    if arm is None or course is None:
        return Run(seed, None, {}, {}, None, None, False, dice, None)
    losses, spread, fixed, seconds = course
    filled = -(-queue_of(arm) // size.batch)
    ends = {name: _ends([step[name] for step in losses], filled) for name in losses[0]}
    return Run(
        seed=seed,
        loss=ends.pop("loss"),
        terms={name.removeprefix("loss/"): pair for name, pair in ends.items()},
        fixed=fixed,
        rank=spread["probe/effective_rank"],
        std=spread["probe/feature_std"],
        collapsed=bool(spread["probe/collapsed"]),
        dice=dice,
        steps_per_s=size.steps / seconds,
    )


@contextmanager
def dataset(
    size: Size, part: str, say: Callable[[str], None], superpixels: Iterable[Superpixels] = ()
) -> Iterator[Data]:
    """The hippocampus data set where it is, else the simulated cohort, in a store that is gone afterwards."""
    root = os.environ.get("TOMOSCALE_DATASETS")
    folder = Path(root) / "msd_hippocampus" if root else None
    if folder is None or not folder.is_dir():
        folder = cohort.ensure()
        say("no $TOMOSCALE_DATASETS/msd_hippocampus: SIMULATED subjects made from one head; figures are of them alone")
    with tempfile.TemporaryDirectory(prefix="tomoscale-learn-") as scratch:
        url = (Path(scratch) / folder.name).as_uri()
        manifest = ingest.run(str(folder), url).manifest
        for kind in superpixels:
            compute = partial(of_volume, settings=kind)
            manifest = derive.run(url, kind.name, compute, recipe=str(resolved(kind))).manifest
        with VolumeStore(url, manifest) as store:
            train = manifest.select(split="train", labelled=LABEL)
            fitted = np.random.Generator(np.random.Philox(key=0)).permutation(train)[: size.fitted].tolist()
            scored = manifest.select(split=part, labelled=LABEL)[: size.scored].tolist()
            if not scored:
                raise ConfigError(f"split {part!r}", expected="labelled volumes", found="none")
            values = label_values(store, fitted, LABEL)
            multiple = network(size).multiple_DHW()

            def case(index: int) -> Case:
                return load_case(store, index, label=LABEL, values=values, policy=POLICY, multiple_DHW=multiple)

            yield Data(
                store=store,
                simulated=bool(manifest.dataset.get("simulated")),
                fitted=[case(i) for i in fitted],
                scored={manifest.record(i).volume_id: case(i) for i in scored},
                classes=len(values) + 1,
            )


def _pretrain(
    arm: Arm, backbone: Pyramid, data: Data, size: Size, seed: int
) -> tuple[list[dict[str, float]], dict[str, float], dict[str, tuple[float, float]], float]:
    """Losses of every step, the probe's figures at the end, those on fixed views before and after, and seconds."""
    config, kind = config_of(arm), method_class(arm.method)
    settings: dict[str, Any] = {
        "steps": size.steps,
        "warmup_steps": size.steps // 20,
        "lr": size.lr,
        "seed": seed,
        "log_every": 1,
    }
    settings |= {"channels_last": True, "precision": "fp32"}  # this layout takes two thirds of the time on a CPU
    engine = Engine(kind(config, backbone), parse(EngineConfig, settings))
    spec = spec_of(arm)
    stream = StreamSpec(
        seed=seed,
        global_batch=size.batch,
        crop_DHW=host_size(spec),
        lanes=size.batch,
        crops_per_visit=2,
        maps=spec.maps,
    )

    def views_of(host: HostBatch) -> ViewBatch:
        return make_views(host, spec, seed=seed, policy=POLICY)

    filling = -(-queue_of(arm) // size.batch)
    with CropStream(data.store, replace(stream, seed=seed + FIXED_SEED), prefetch=2, threads=1) as batches:
        fixed = [views_of(next(batches)) for _ in range(filling + FIXED_BATCHES)]
    before = on_fixed_views(engine, fixed, filling)
    views: ViewBatch | None = None
    losses, began = [], time.perf_counter()
    with CropStream(data.store, stream, prefetch=2, threads=1) as batches:
        for _ in range(size.steps):
            views = views_of(next(batches))
            metrics = engine.step(views)
            losses.append({name: value for name, value in metrics.items() if name.partition("/")[0] == "loss"})
    seconds = time.perf_counter() - began
    if views is None:
        raise ConfigError("steps", expected="at least 1", found="0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # the row says so
        spread = probe(engine, views)
    after = on_fixed_views(engine, fixed, filling)
    return losses, spread, {name: (before[name], after[name]) for name in before}, seconds


@torch.no_grad()
def on_fixed_views(engine: Engine, views: Sequence[ViewBatch], filling: int) -> dict[str, float]:
    """Means of the loss and the monitors over batches of views, at the weights that the method has.

    What a method with a queue says in training cannot be compared over time: its negatives come from earlier weights,
    and are the easier to tell from the positive the faster the weights change. So here the first batches fill the queue
    with what these weights make of other views. A weight that follows a schedule has its first value.

    Args:
        engine: Nothing of its state changes.
        views: Batches, the same whenever figures are to be compared.
        filling: How many of them only fill the queue.

    Returns:
        `loss`, its terms `loss/NAME` and `monitor/NAME`.
    """
    method: Any = copy.deepcopy(engine.method)
    ctx = StepContext(0, engine.config.steps, engine.config.seed)
    sums: dict[str, list[float]] = {}
    for number, batch in enumerate(views):
        terms: LossTerms = method(batch, ctx)
        if number < filling:
            method.after_step(ctx)
            continue
        values = {"loss": terms.total}
        values |= {f"loss/{name}": value for name, value in terms.terms.items()}
        values |= {f"monitor/{name}": value for name, value in terms.monitors.items()}
        for name, value in values.items():
            sums.setdefault(name, []).append(float(value))
    return {name: statistics.fmean(figures) for name, figures in sums.items()}


def _ends(values: Sequence[float], after: int = 0) -> tuple[float, float]:
    """Medians over a tenth of the values, the first ones `after` so many and the last ones."""
    tenth = max(len(values) // 10, 1)
    start = min(after, len(values) - tenth)
    return statistics.median(values[start : start + tenth]), statistics.median(values[-tenth:])


def _line(name: str, run: Run) -> str:
    line = f"{name}, seed {run.seed}: probe Dice {statistics.fmean(run.dice.values()):.4f}"
    if run.loss is None:
        return line
    before, after = run.fixed["loss"]
    return f"{line}, loss {before:.4f} to {after:.4f}, rank {run.rank:.1f}, {run.steps_per_s:.2f} steps/s"
