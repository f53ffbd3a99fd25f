"""What a training step costs, by method and backbone: samples per second, peak memory, and where the time goes.

    tomoscale bench step --methods pgl,simclr --variants plain,bf16 --size 64 64 64 --out step.json

Crops are made in memory unless a store is named, so data wait is that of the source. Times are medians over steps
after a warm-up. Where the time goes is measured in further steps, as stamps at the borders of the parts would slow the
measured ones. The rate of plain convolutions is measured in the same run, in each row's precision and the better of
both memory layouts: the share of it that a step reaches says how much is left to gain.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ssl_core.methods  # noqa: F401  registers them
from jobs.bench.device.facts import machine
from jobs.bench.device.rate import convolution_rate, seconds, step_operations, wait
from ssl_core.config import parse
from ssl_core.distributed import current
from ssl_core.methods.base import method_class
from ssl_core.networks import build
from ssl_core.testing.memory import peak_of
from ssl_core.train.engine import Engine, EngineConfig
from ssl_core.train.precision import resolve_precision
from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import ViewBatch, ViewSpec
from storage.errors import ConfigError
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream, HostBatch
from storage.stream.plan import StreamSpec

Triple = tuple[int, int, int]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
PARTS = ("wait", "views", "network", "loss", "backward", "update")
Backbones = dict[str, tuple[str, dict[str, Any]]]
BACKBONES: Backbones = {
    "basic_unet": ("basic_unet", {"features": (16, 16, 32, 64, 128, 16)}),
    "unet": ("unet", {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2), "num_res_units": 2}),
    "dynunet": (
        "dynunet",
        {"filters": (16, 32, 64, 128, 256), "strides": (1, 2, 2, 2, 2), "kernel_size": (3, 3, 3, 3, 3)},
    ),
    "segresnet": ("segresnet", {"init_filters": 16}),
    "swin_unetr": ("swin_unetr", {"feature_size": 12}),
    "resenc_s": ("resenc", {"preset": "S"}),
    "resenc_m": ("resenc", {"preset": "M"}),
    "resenc_l": ("resenc", {"preset": "L"}),
}
"""Names of the benchmark: registered name and arguments. The first five are narrow, for a CPU; ResEnc is nnU-Net's."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "channels_last": {"precision": "fp32", "channels_last": True},
    "bf16_channels_last": {"precision": "bf16", "channels_last": True},
    "unfused": {"precision": "fp32", "fused": False},
    "compile": {"precision": "fp32", "compile": True},
    "checkpointing": {"precision": "fp32", "activation_checkpointing": True},
}
"""Engine settings that are compared; `plain` has fp32, the fused optimizer and nothing else."""


@dataclass(frozen=True)
class Row:
    """One method on one backbone under one variant of the engine's settings.

    Attributes:
        variant: Name in `VARIANTS`.
        samples_per_s: Batch over the median time of a step, views and data wait included.
        step_s: Median and 95th percentile of a step, seconds.
        state_mib: What lasts from step to step: weights, their moving averages, queues, and the optimizer's moments.
        step_mib: Most that a step holds beyond that: views, activations, gradients. By torch's allocator, so that
            neither libraries nor other rows count.
        shares: Share of the step's time by part of `PARTS`: waiting for crops, making views, the networks' layers, the
            rest of the method's forward pass, backward pass with gradient averaging and clipping, update with moving
            averages.
        gflop: Operations of convolutions and matrix products that a step needs, 1e9.
        rate_gflops: What 3x3x3 convolutions reached in this run in the same precision, 1e9 a second.
        reached: Share of that rate: `gflop` over the median step over `rate_gflops`.
    """

    method: str
    backbone: str
    variant: str
    device: str
    precision: str
    batch: int
    size_DHW: Triple
    parameters: int
    samples_per_s: float
    step_s: tuple[float, float]
    state_mib: float
    step_mib: float
    shares: dict[str, float]
    gflop: float
    rate_gflops: float
    reached: float


POLICY = IntensityPolicy.model_validate({})


def crops(spec: ViewSpec, batch: int, seed: int = 0) -> Iterator[HostBatch]:
    """Endless batches of the crops that the views need: int16, smooth structure and noise, from one volume each.

    Maps hold blocks of 8 voxels a side.
    """
    rng = np.random.default_rng(seed)
    host = host_size(spec)
    coarse = rng.normal(0, 300, (batch, 1, *(n // 8 + 1 for n in host)))
    smooth = coarse.repeat(8, 2).repeat(8, 3).repeat(8, 4)[:, :, : host[0], : host[1], : host[2]]
    image = (smooth + rng.normal(0, 30, smooth.shape)).astype(np.int16)
    blocks = rng.integers(1, 1000, (batch, *(n // 8 + 1 for n in host)), np.int32)
    ids = blocks.repeat(8, 1).repeat(8, 2).repeat(8, 3)[:, : host[0], : host[1], : host[2]]
    step = 0
    while True:
        yield HostBatch(
            image_BCDHW=image,
            label_BDHW=None,
            start_B3=np.zeros((batch, 3), np.int64),
            volume_B=np.arange(batch, dtype=np.int64),
            sample_B=np.arange(step * batch, (step + 1) * batch, dtype=np.int64),
            scale_B=np.ones(batch, np.float32),
            offset_B=np.zeros(batch, np.float32),
            shape_B3=np.tile(np.array(host, np.float64), (batch, 1)),
            spacing_B3=np.ones((batch, 3)),
            stats_BCS=np.tile(np.array([-900, 900, 0, 300, -700, 700], np.float32), (batch, 1, 1)),
            maps_BDHW=dict.fromkeys(spec.maps, ids),
        )
        step += 1


def stored(url: str, spec: ViewSpec, batch: int) -> Iterator[HostBatch]:
    """Batches that a store streams, read ahead as in a job."""
    with VolumeStore(url) as store:
        stream_spec = StreamSpec(
            seed=0, global_batch=batch, crop_DHW=host_size(spec), crops_per_visit=2, maps=spec.maps
        )
        with CropStream(store, stream_spec) as stream:
            yield from stream


def measure(
    method: str,
    backbone: str,
    *,
    size_DHW: Triple,
    batch: int = 4,
    steps: int = 10,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    variant: str = "plain",
    engine_settings: Mapping[str, Any] | None = None,
    source: Callable[[ViewSpec], Iterator[HostBatch]] | None = None,
    operations: float = math.nan,
    rate: float = math.nan,
    backbones: Backbones = BACKBONES,
) -> Row:
    """Train `warmup + 2 * steps` steps and look at the clock, and one more for the memory.

    Args:
        method: Registered name.
        backbone: Name in `backbones`.
        size_DHW: Voxels of a view, for methods whose views are configured by `crops`; others keep their own.
        batch: Samples of a step on this rank.
        steps: Steps measured, for speed and again for the shares.
        warmup: Steps before; they also compile, where that is asked for.
        device: Where.
        variant: Name in `VARIANTS`.
        engine_settings: Of `EngineConfig`; they come after the variant's.
        source: Host batches for a view spec; by default `crops`.
        operations: Those of a step, for `Row.gflop`.
        rate: That of convolutions a second, for `Row.rate_gflops`.
        backbones: What the names mean.

    Raises:
        ConfigError: unknown names, or sizes that the backbone refuses.
    """
    device = torch.device(device)
    settings = {"steps": warmup + 2 * steps + 1, "warmup_steps": 0, "log_every": 10**9} | _entry(
        VARIANTS, "variant", variant
    )
    model = method_on(method, backbone, size_DHW, backbones)
    spec = type(model).view_spec(model.config)
    engine = Engine(
        model,
        parse(EngineConfig, settings | dict(engine_settings or {}), "bench engine"),
        collectives=current(),
        device=device,
    )
    batches = source(spec) if source is not None else crops(spec, batch)

    def views_of(host: HostBatch) -> ViewBatch:
        return make_views(host, spec, seed=0, policy=POLICY, device=device, dtype=engine.dtype)

    for _ in range(warmup):
        engine.step(views_of(next(batches)))
    times = [seconds(lambda: engine.step(views_of(next(batches))), device) for _ in range(steps)]
    parts = [_parts(engine, batches, views_of) for _ in range(steps)]
    sums = {name: sum(p[name] for p in parts) for name in PARTS}
    peak = peak_of(lambda: engine.step(views_of(next(batches))), device)
    middle = statistics.median(times)
    return Row(
        method=method,
        backbone=backbone,
        variant=variant,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        precision=engine.precision,
        batch=batch,
        size_DHW=size_DHW,
        parameters=sum(p.numel() for p in engine.method.parameters()),
        samples_per_s=batch / middle,
        step_s=(middle, float(np.quantile(times, 0.95))),
        state_mib=_bytes_of(engine) / 2**20,
        step_mib=peak / 2**20,
        shares={name: value / sum(sums.values()) for name, value in sums.items()},
        gflop=operations / 1e9,
        rate_gflops=rate / 1e9,
        reached=operations / middle / rate,
    )


def _bytes_of(engine: Engine) -> int:
    """Of all tensors of the state, each once."""
    moments = [value for entry in engine.optimizer.state_dict().values() for value in entry.values()]
    tensors = [*engine.method.parameters(), *engine.method.buffers(), *moments]
    return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values())


def method_on(method: str, backbone: str, size_DHW: Triple, backbones: Backbones = BACKBONES) -> Any:
    """A method with views of this size on a network of the benchmark, seed 0."""
    kind = method_class(method)
    name, arguments = _entry(backbones, "backbone", backbone)
    torch.manual_seed(0)
    network = build(name, **arguments)
    # Of the views only the size is the benchmark's; the smallest that the network can be trained on for local crops.
    sizes = {"crops": list(size_DHW), "local": [max(16, 2 * n) for n in network.multiple_DHW()]}
    fields = kind.Config.model_fields
    data = {key: fields[key].default.model_dump() | {"size_DHW": size} for key, size in sizes.items() if key in fields}
    return kind(parse(kind.Config, data, f"bench {method}"), network)


def _entry(table: Mapping[str, Any], what: str, name: str) -> Any:
    if name not in table:
        raise ConfigError(f"{what} {name!r}", expected="one of " + ", ".join(table), found=repr(name))
    return table[name]


def _parts(
    engine: Engine, batches: Iterator[HostBatch], views_of: Callable[[HostBatch], ViewBatch]
) -> dict[str, float]:
    """Seconds of one step by part, the device waited for at each border."""
    spent = dict.fromkeys(PARTS, 0.0)
    last = [0.0]

    def close(part: str) -> Callable[..., None]:
        """A hook that books the time since the last border under `part`."""

        def hook(*_: Any) -> None:
            wait(engine.device)
            now = time.perf_counter()
            spent[part] += now - last[0]
            last[0] = now

        return hook

    layers = [m for m in engine.method.modules() if not any(True for _ in m.children())]
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(close("loss")))
            hooks.enter_context(layer.register_forward_hook(close("network")))
        # A second forward pass of a step ends the backward pass of the first.
        hooks.enter_context(engine.method.register_forward_pre_hook(close("backward")))
        hooks.enter_context(engine.method.register_forward_hook(close("loss")))
        hooks.enter_context(register_optimizer_step_pre_hook(close("backward")))
        wait(engine.device)
        last[0] = time.perf_counter()
        host = next(batches)
        close("wait")()
        views = views_of(host)
        close("views")()
        engine.step(views)
        close("update")()
    return spent


def table(rows: Sequence[Row]) -> str:
    """Aligned plain text."""
    head = ["method", "backbone", "variant", "batch", "size", "M params", "samples/s", "step s", "p95 s"]
    head += ["state MiB", "step MiB"]
    lines = [[*head, *(f"{part} %" for part in PARTS), "GFLOP", "of conv rate %"]]
    for row in rows:
        size = "x".join(map(str, row.size_DHW))
        figures = [
            f"{row.samples_per_s:.2f}",
            f"{row.step_s[0]:.3f}",
            f"{row.step_s[1]:.3f}",
            f"{row.state_mib:.0f}",
            f"{row.step_mib:.0f}",
        ]
        facts = [row.method, row.backbone, row.variant, str(row.batch), size, f"{row.parameters / 1e6:.2f}"]
        shares = [f"{100 * row.shares[part]:.1f}" for part in PARTS]
        lines.append([*facts, *figures, *shares, f"{row.gflop:.1f}", f"{100 * row.reached:.0f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def bench_step(
    methods: Sequence[str],
    backbones: Sequence[str],
    *,
    variants: Sequence[str] = ("plain",),
    devices: Sequence[str] = (),
    data: str | None = None,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> dict[str, Any]:
    """Every method on every backbone, variant and device; see `measure` for the settings.

    Args:
        methods: Registered names.
        backbones: Names in `BACKBONES`.
        variants: Names in `VARIANTS`.
        devices: By default the CPU, and CUDA where there is one.
        data: URL of a store to stream from instead of memory.
        say: Hears of each row when it is done.

    Returns:
        JSON-able: `machine`, `rows`, and the convolution `rates` (operations a second) by device and precision.
    """
    devices = devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    batch = settings.setdefault("batch", 4)
    if data is not None:
        settings["source"] = lambda spec: stored(data, spec, batch)
    rows: list[Row] = []
    rates: dict[str, float] = {}
    for device in map(torch.device, devices):
        # All of them first: what a network refuses is refused before anything is measured.
        counts = {(m, b): operations_of(m, b, settings["size_DHW"], batch, device) for b in backbones for m in methods}
        for backbone in backbones:
            for method in methods:
                operations = counts[method, backbone]
                for variant in variants:
                    rate = _rate(rates, device, variant, settings.get("engine_settings") or {})
                    row = measure(
                        method, backbone, device=device, variant=variant, operations=operations, rate=rate, **settings
                    )
                    rows.append(row)
                    say(f"{row.device}: {method} on {backbone}, {variant}: {row.samples_per_s:.2f} samples/s")
    return {
        "machine": machine(map(torch.device, devices)),
        "rates": rates,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def operations_of(
    method: str, backbone: str, size_DHW: Triple, batch: int, device: torch.device, backbones: Backbones = BACKBONES
) -> float:
    """Floating-point operations of a step; see `step_operations`."""
    model = method_on(method, backbone, size_DHW, backbones).to(device)
    spec = type(model).view_spec(model.config)
    host = next(crops(spec, batch))
    views = make_views(host, spec, seed=0, policy=POLICY, device=device)
    return step_operations(model, views)


def _rate(rates: dict[str, float], device: torch.device, variant: str, more: Mapping[str, Any]) -> float:
    settings = parse(EngineConfig, _entry(VARIANTS, "variant", variant) | dict(more), "bench engine")
    precision = resolve_precision(settings.precision, device)
    key = f"{device} {precision}"
    if key not in rates:
        rates[key] = convolution_rate(device, DTYPES[precision])
    return rates[key]
