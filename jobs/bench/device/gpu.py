"""All that only an accelerator can tell, in one run of minutes and without a cluster.

    python -m jobs.bench gpu --out gpu.json

In the order of value, since a machine may be lent for minutes only: how fast it convolves, the variants of a step with
their memory, where views are best made, the step beside a twin that loads no data, nnssl's grid. A part that fails or
finds no time left says so and the others go on. Times between parts are the device's own, by events, so that no step
is waited for; only the shares of `jobs.bench.device.step` come from steps that are.
"""

import dataclasses
import gc
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from jobs.bench.device.facts import machine
from jobs.bench.device.nnssl import HARDWARE, PUBLISHED, SIZE, SOURCE
from jobs.bench.device.rate import convolution_rate, wait
from jobs.bench.device.step import (
    BACKBONES,
    DTYPES,
    POLICY,
    VARIANTS,
    Backbones,
    Triple,
    crops,
    measure,
    method_on,
    operations_of,
)
from ssl_core.config import parse
from ssl_core.testing.views import map_tensors
from ssl_core.to_device import to_device
from ssl_core.train.engine import Engine, EngineConfig
from ssl_core.train.precision import resolve_precision
from ssl_core.views.augment import presets
from ssl_core.views.make import make_views
from ssl_core.views.types import ViewBatch, ViewSpec
from storage.errors import TomoscaleError
from storage.stream.crop_stream import HostBatch


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        methods: For variants and views.
        backbone: Name in `backbones`.
        size_DHW: Voxels of a view.
        batch: Samples of a step.
        steps: Measured of each row.
        warmup: Steps before them.
        variants: Names in `jobs.bench.device.step.VARIANTS`; compiling comes last, as it takes longest.
        nnssl: Batches in crops of nnssl's grid.
        nnssl_size_DHW: Voxels of its crops.
        nnssl_backbone: Its network.
        rates: Channels and side of the cubes whose convolutions are measured; None takes all of them.
        workers: Threads that make views on the CPU.
    """

    methods: tuple[str, ...] = ("simclr", "pgl")
    backbone: str = "resenc_m"
    size_DHW: Triple = (64, 64, 64)
    batch: int = 8
    steps: int = 10
    warmup: int = 3
    variants: tuple[str, ...] = ("plain", "bf16", "channels_last", "bf16_channels_last", "checkpointing", "compile")
    nnssl: tuple[int, ...] = tuple(p.samples * p.crops for p in PUBLISHED)
    nnssl_size_DHW: Triple = SIZE
    nnssl_backbone: str = "resenc_l"
    rates: tuple[tuple[int, int], ...] | None = None
    workers: int = 8


FULL = Size()
FAST = {"precision": "bf16", "channels_last": True, "deterministic": False}
"""Engine settings of what is not a variant."""
MakeViews = Callable[[HostBatch], ViewBatch]


def bench_gpu(
    size: Size = FULL,
    *,
    device: torch.device | str = "cuda",
    limit_s: float = 400.0,
    say: Callable[[str], None] = print,
    backbones: Backbones = BACKBONES,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Every part that fits the time.

    Args:
        size: What is measured.
        device: Where.
        limit_s: Nothing is begun after so many seconds; what is under way is finished.
        say: Hears of each part when it is done.
        backbones: What names of networks mean.
        clock: Seconds from a fixed point.

    Returns:
        JSON-able: `machine`, `size`, `rates` (operations a second by precision), rows of `variants`, `views`, `twin`
        and `nnssl`, nnssl's `published` figures, what was `left_out` and why, and `spent_s`.
    """
    where, began = torch.device(device), clock()
    result: dict[str, Any] = {"machine": machine([where]), "size": dataclasses.asdict(size), "rates": {}}
    rows: dict[str, list[Any]] = {"variants": [], "views": [], "twin": [], "nnssl": [], "left_out": []}

    def part(group: str, name: str, work: Callable[[], Any]) -> None:
        if clock() - began > limit_s:
            rows["left_out"].append({"part": f"{group}, {name}", "why": f"no time left of {limit_s:.0f} s"})
            return
        try:
            rows[group].append(work())
        except (RuntimeError, TomoscaleError) as error:  # out of memory and what a compiler refuses are such
            lines = str(error).strip().splitlines() or [type(error).__name__]
            rows["left_out"].append({"part": f"{group}, {name}", "why": f"{type(error).__name__}: {lines[0][:200]}"})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"{group}, {name}: {clock() - began:.0f} s")

    for precision in ("fp32", "bf16"):
        result["rates"][precision] = convolution_rate(where, DTYPES[precision], shapes=size.rates)

    counts: dict[tuple[str, str, Triple], float] = {}

    def row(
        method: str, backbone: str, edge: Triple, batch: int, variant: str, deterministic: bool = False
    ) -> dict[str, Any]:
        precision = resolve_precision(str(VARIANTS[variant]["precision"]), where)
        if (method, backbone, edge) not in counts:  # of one sample, on the CPU: they are the same everywhere
            counts[method, backbone, edge] = operations_of(method, backbone, edge, 1, torch.device("cpu"), backbones)
        flops = counts[method, backbone, edge] * batch
        rate = float(result["rates"].get(precision, math.nan))
        measured = measure(
            *(method, backbone),
            size_DHW=edge,
            batch=batch,
            steps=size.steps,
            warmup=size.warmup,
            device=where,
            variant=variant,
            engine_settings={"deterministic": deterministic},
            operations=flops,
            rate=rate,
            backbones=backbones,
        )
        name = f"{variant}, deterministic" if deterministic else variant
        return dataclasses.asdict(measured) | {"variant": name}

    slow = [name for name in size.variants if name == "compile"]
    for variant in [name for name in size.variants if name not in slow]:
        for method in size.methods:
            part("variants", f"{method}, {variant}", lambda m=method, v=variant: row(m, *_of(size), v))  # type: ignore[misc]
    for method in size.methods:
        part(
            "variants",
            f"{method}, deterministic",
            lambda m=method: row(m, *_of(size), "bf16_channels_last", deterministic=True),  # type: ignore[misc]
        )
        for way in WAYS:
            part("views", f"{method}, {way}", lambda m=method, w=way: views_row(size, m, w, where, backbones))  # type: ignore[misc]
        part("twin", method, lambda m=method: twin_row(size, m, where, backbones))  # type: ignore[misc]
    for batch in size.nnssl:
        edge, network = size.nnssl_size_DHW, size.nnssl_backbone
        part(
            "nnssl",
            f"{batch} crops",
            lambda b=batch, e=edge, n=network: row("simclr", n, e, b, "bf16_channels_last"),  # type: ignore[misc]
        )
    for method in size.methods if slow else ():
        part("variants", f"{method}, compile", lambda m=method: row(m, *_of(size), "compile"))  # type: ignore[misc]
    published = [dataclasses.asdict(p) | {"views_per_s": p.views_per_s} for p in PUBLISHED]
    peer = {"published": published, "hardware": HARDWARE, "source": SOURCE}
    return result | rows | {"peer": peer, "limit_s": limit_s, "spent_s": clock() - began}


def _of(size: Size) -> tuple[str, Triple, int]:
    return size.backbone, size.size_DHW, size.batch


class Stamps:
    """Times that a device passed, without a wait until they are read.

    Args:
        device: Of the work between.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stamps: list[Any] = []

    def add(self) -> None:
        """Now, in the order of the work that was given to the device."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._stamps.append(event)
        else:
            self._stamps.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each stamp and the next; waits for the last."""
        wait(self._device)
        pairs = pairwise(self._stamps)
        if self._device.type == "cuda":
            return [float(one.elapsed_time(other)) / 1000 for one, other in pairs]
        return [other - one for one, other in pairs]


WAYS = ("all on the device", "spatial on the CPU", "all on the CPU")
"""Where views are made. What the CPU makes is made ahead, by threads."""


def views_row(size: Size, method: str, way: str, device: torch.device, backbones: Backbones) -> dict[str, Any]:
    """Samples a second, and the device's time by part, with views made in one of `WAYS`."""
    engine, spec = _engine(size, method, device, backbones)
    host = crops(spec, size.batch)
    make = _maker(way, spec, device, engine.dtype)
    threads = 0 if way == WAYS[0] else size.workers
    with ThreadPoolExecutor(max(1, threads)) as pool:
        # Threads make what is on the CPU; the rest is launched by the thread that trains.
        batches = _ahead(host, make.ahead, pool, threads)
        times = _timed(engine, lambda: next(batches), make.rest, size, device)
    return {"method": method, "way": way, "threads": threads, "batch": size.batch, **times}


def twin_row(size: Size, method: str, device: torch.device, backbones: Backbones) -> dict[str, Any]:
    """A step that makes its views from new crops beside a twin whose views stay on the device."""
    engine, spec = _engine(size, method, device, backbones)
    host = crops(spec, size.batch)
    whole = _timed(engine, lambda: next(host), lambda b: _on_device(b, spec, device, engine.dtype), size, device)
    same = _on_device(next(host), spec, device, engine.dtype)
    twin = _timed(engine, lambda: same, lambda views: views, size, device)
    ratio = whole["samples_per_s"] / twin["samples_per_s"]
    return {"method": method, "batch": size.batch, "whole": whole, "twin": twin, "of_twin": ratio}


def _engine(size: Size, method: str, device: torch.device, backbones: Backbones) -> tuple[Engine, ViewSpec]:
    model = method_on(method, size.backbone, size.size_DHW, backbones)
    settings = {"steps": 10**6, "warmup_steps": 0, "log_every": 10**6} | FAST
    engine = Engine(model, parse(EngineConfig, settings, "bench engine"), device=device)
    return engine, type(model).view_spec(model.config)


def _timed(
    engine: Engine, fetch: Callable[[], Any], rest: Callable[[Any], ViewBatch], size: Size, device: torch.device
) -> dict[str, Any]:
    """The rate of steps that nobody waits for, and shares of the device's time.

    Args:
        engine: What trains.
        fetch: What the device waits for: a batch from its source, or from threads.
        rest: Makes views of it on the device.
        size: How many steps of how many samples.
        device: Where.
    """
    for _ in range(size.warmup):
        engine.step(rest(fetch()))
    wait(device)
    stamps, began = Stamps(device), time.perf_counter()
    stamps.add()
    for _ in range(size.steps):
        item = fetch()
        stamps.add()
        views = rest(item)
        stamps.add()
        engine.step(views)
        stamps.add()
    spent = stamps.seconds()
    wall, every = time.perf_counter() - began, max(sum(spent), 1e-12)
    shares = {name: sum(spent[index::3]) / every for index, name in enumerate(("wait", "views", "step"))}
    return {"samples_per_s": size.batch * size.steps / wall, "step_s": wall / size.steps, "shares": shares}


@dataclass(frozen=True)
class _Maker:
    """What threads do of the views, and what is left to the thread that trains."""

    ahead: Callable[[HostBatch], Any]
    rest: Callable[[Any], ViewBatch]


def _maker(way: str, spec: ViewSpec, device: torch.device, dtype: torch.dtype) -> _Maker:
    if way == WAYS[0]:
        return _Maker(lambda host: host, lambda host: _on_device(host, spec, device, dtype))
    if way == WAYS[2]:
        return _Maker(lambda host: _on_device(host, spec, torch.device("cpu"), dtype), lambda v: _moved(v, device))
    spatial = dataclasses.replace(spec, roles=tuple(dataclasses.replace(role, intensity="none") for role in spec.roles))

    def ahead(host: HostBatch) -> tuple[ViewBatch, Any]:
        return _on_device(host, spatial, torch.device("cpu"), dtype), host.sample_B

    def rest(item: tuple[ViewBatch, Any]) -> ViewBatch:
        views, sample_B = _moved(item[0], device), np.asarray(item[1], np.int64)
        roles = {}
        for role in spec.roles:
            several = views.roles[role.name]
            images = torch.stack([view.image_BCDHW for view in several])
            changed = presets.augment(images, role.intensity, seed=0, sample_B=sample_B, role=role.name).to(dtype)
            roles[role.name] = tuple(
                dataclasses.replace(view, image_BCDHW=image) for view, image in zip(several, changed, strict=True)
            )
        return dataclasses.replace(views, roles=roles)

    return _Maker(ahead, rest)


def _on_device(host: HostBatch, spec: ViewSpec, device: torch.device, dtype: torch.dtype) -> ViewBatch:
    return make_views(host, spec, seed=0, policy=POLICY, device=device, dtype=dtype)


def _moved(views: ViewBatch, device: torch.device) -> ViewBatch:
    return map_tensors(views, lambda x: to_device(x.numpy(), device))


def _ahead(
    source: Iterator[HostBatch], make: Callable[[HostBatch], Any], pool: ThreadPoolExecutor, threads: int
) -> Iterator[Any]:
    """`make` of each item in order, by threads as far ahead as there are; at once where there is none."""
    if not threads:
        yield from map(make, source)
        return
    queue: deque[Future[Any]] = deque()
    while True:
        while len(queue) < threads + 1:
            queue.append(pool.submit(make, next(source)))
        yield queue.popleft().result()
