"""What a training step costs, by method and backbone: samples per second, peak memory, and where the time goes.

    python -m ssl_core.bench.step --methods pgl,simclr --size 64 64 64 --json step.json

Crops are made in memory, so the share of data wait is that of the given source: none here, the store's in a job that
hands in a `CropStream`. Times are medians over steps after a warm-up. Where the time goes is measured in further steps,
as stamps at the borders of the parts would slow the measured ones.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ssl_core.methods  # noqa: F401  registers them
from ssl_core.backbones import build
from ssl_core.bench.memory import peak_mib, reset_peak
from ssl_core.config import load, parse
from ssl_core.distributed import current
from ssl_core.engine import Engine, EngineConfig
from ssl_core.intensity import IntensityPolicy
from ssl_core.make_views import make_views
from ssl_core.methods.base import method_class, method_names
from ssl_core.views import ViewBatch, ViewSpec
from storage.errors import TomoscaleError
from storage.stream import HostBatch

Triple = tuple[int, int, int]
PARTS = ("wait", "views", "network", "loss", "backward", "update")
BACKBONES: dict[str, dict[str, Any]] = {
    "basic_unet": {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "features": (16, 16, 32, 64, 128, 16)}
}


@dataclass(frozen=True)
class Row:
    """One method on one backbone.

    Attributes:
        samples_per_s: Batch over the median time of a step, views and data wait included.
        step_s: Median and 95th percentile of a step, seconds.
        peak_mib: Largest memory: allocated on CUDA; resident size of the process on CPU, libraries included.
        shares: Share of the step's time by part of `PARTS`: waiting for crops, making views, the networks' layers, the
            rest of the method's forward pass, backward pass with gradient averaging and clipping, update with moving
            averages.
    """

    method: str
    backbone: str
    device: str
    precision: str
    batch: int
    size_DHW: Triple
    parameters: int
    samples_per_s: float
    step_s: tuple[float, float]
    peak_mib: float
    shares: dict[str, float]


def crops(spec: ViewSpec, batch: int, seed: int = 0) -> Iterator[HostBatch]:
    """Endless batches of the crops that the views need: int16, smooth structure and noise, from one volume each."""
    rng = np.random.default_rng(seed)
    host = spec.host_size_DHW
    coarse = rng.normal(0, 300, (batch, 1, *(n // 8 + 1 for n in host)))
    smooth = coarse.repeat(8, 2).repeat(8, 3).repeat(8, 4)[:, :, : host[0], : host[1], : host[2]]
    image = (smooth + rng.normal(0, 30, smooth.shape)).astype(np.int16)
    step = 0
    while True:
        yield HostBatch(
            image_BCDHW=image,
            label_BDHW=np.zeros((batch, *host), np.uint8),
            start_B3=np.zeros((batch, 3), np.int64),
            volume_B=np.arange(batch, dtype=np.int64),
            sample_B=np.arange(step * batch, (step + 1) * batch, dtype=np.int64),
            scale_B=np.ones(batch, np.float32),
            offset_B=np.zeros(batch, np.float32),
            shape_B3=np.tile(np.array(host, np.float64), (batch, 1)),
            spacing_B3=np.ones((batch, 3)),
            stats_BS=np.tile(np.array([-900, 900, 0, 300, -700, 700], np.float32), (batch, 1)),
        )
        step += 1


def measure(
    method: str,
    backbone: str,
    *,
    size_DHW: Triple,
    batch: int = 4,
    steps: int = 10,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    arguments: Mapping[str, Any] | None = None,
    engine_settings: Mapping[str, Any] | None = None,
    source: Callable[[ViewSpec], Iterator[HostBatch]] | None = None,
) -> Row:
    """Train `warmup + 2 * steps` steps and look at the clock.

    Args:
        method: Registered name.
        backbone: Registered name.
        size_DHW: Voxels of a view, for methods whose views are configured by `crops`; others keep their own.
        batch: Samples of a step on this rank.
        steps: Steps measured, for speed and again for the shares.
        warmup: Steps before.
        device: Where.
        arguments: Of the backbone; by default those in `BACKBONES`.
        engine_settings: Of `EngineConfig`.
        source: Host batches for a view spec; by default `crops`.

    Raises:
        ConfigError: unknown names, or sizes that the backbone refuses.
    """
    device = torch.device(device)
    kind = method_class(method)
    data = {"crops": {"size_DHW": list(size_DHW)}} if "crops" in kind.Config.model_fields else {}
    config = parse(kind.Config, data, f"bench {method}")
    chosen = BACKBONES.get(backbone, {}) if arguments is None else arguments
    settings = {"steps": warmup + 2 * steps, "warmup_steps": 0, "log_every": 10**9} | dict(engine_settings or {})
    torch.manual_seed(0)
    reset_peak(device)
    engine = Engine(
        kind(config, build(backbone, **chosen)),
        parse(EngineConfig, settings, "bench engine"),
        collectives=current(),
        device=device,
    )
    spec = kind.view_spec(config)
    batches = source(spec) if source is not None else crops(spec, batch)

    policy = IntensityPolicy.model_validate({})

    def views_of(host: HostBatch) -> ViewBatch:
        return make_views(host, spec, seed=0, policy=policy, device=device, dtype=engine.dtype)

    for _ in range(warmup):
        engine.step(views_of(next(batches)))
    times = [_timed(lambda: engine.step(views_of(next(batches))), device) for _ in range(steps)]
    peak = peak_mib(device)
    parts = [_parts(engine, batches, views_of) for _ in range(steps)]
    sums = {name: sum(p[name] for p in parts) for name in PARTS}
    middle = statistics.median(times)
    return Row(
        method=method,
        backbone=backbone,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        precision=engine.precision,
        batch=batch,
        size_DHW=size_DHW,
        parameters=sum(p.numel() for p in engine.method.parameters()),
        samples_per_s=batch / middle,
        step_s=(middle, float(np.quantile(times, 0.95))),
        peak_mib=peak,
        shares={name: value / sum(sums.values()) for name, value in sums.items()},
    )


def _timed(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parts(
    engine: Engine, batches: Iterator[HostBatch], views_of: Callable[[HostBatch], ViewBatch]
) -> dict[str, float]:
    """Seconds of one step by part, the device waited for at each border."""
    found = dict.fromkeys(PARTS, 0.0)
    last = [0.0]

    def close(part: str) -> Callable[..., None]:
        """A hook that books the time since the last border under `part`."""

        def hook(*_: Any) -> None:
            _wait(engine.device)
            now = time.perf_counter()
            found[part] += now - last[0]
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
        _wait(engine.device)
        last[0] = time.perf_counter()
        host = next(batches)
        close("wait")()
        views = views_of(host)
        close("views")()
        engine.step(views)
        close("update")()
    return found


def table(rows: Sequence[Row]) -> str:
    """Aligned plain text."""
    head = ["method", "backbone", "precision", "batch", "size", "M params", "samples/s", "step s", "p95 s", "peak MiB"]
    lines = [[*head, *(f"{part} %" for part in PARTS)]]
    for row in rows:
        size = "x".join(map(str, row.size_DHW))
        figures = [f"{row.samples_per_s:.2f}", f"{row.step_s[0]:.3f}", f"{row.step_s[1]:.3f}", f"{row.peak_mib:.0f}"]
        facts = [row.method, row.backbone, row.precision, str(row.batch), size, f"{row.parameters / 1e6:.2f}"]
        lines.append([*facts, *figures, *(f"{100 * row.shares[part]:.1f}" for part in PARTS)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def bench_step(
    methods: Sequence[str],
    backbones: Sequence[str],
    *,
    devices: Sequence[str] = (),
    say: Callable[[str], None] = print,
    **settings: Any,
) -> dict[str, Any]:
    """Every method on every backbone and device; see `measure` for the settings.

    Args:
        methods: Registered names.
        backbones: Names in `BACKBONES`.
        devices: By default the CPU, and CUDA where there is one.
        say: Hears of each row when it is done.

    Returns:
        JSON-able: `machine` and `rows`.
    """
    devices = devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    rows = []
    for device in devices:
        for backbone in backbones:
            for method in methods:
                row = measure(method, backbone, device=device, **settings)
                rows.append(dataclasses.asdict(row))
                say(f"{row.device}: {method} on {backbone}: {row.samples_per_s:.2f} samples/s")
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": platform.machine(),
    }
    return {"machine": machine, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m ssl_core.bench.step", description="What a training step costs")
    parser.add_argument("--methods", default=",".join(method_names()), help="names, comma-separated")
    parser.add_argument("--backbones", default="basic_unet", help="names, comma-separated")
    parser.add_argument("--devices", default="", help="such as cpu,cuda; default: all there are")
    parser.add_argument("--size", type=int, nargs=3, default=[64, 64, 64], metavar=("D", "H", "W"), help="of a view")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the engine, such as precision=bf16")
    given = parser.parse_args(argv)
    try:
        settings = load(EngineConfig, {}, given.settings).model_dump(exclude_unset=True)
        found = bench_step(
            given.methods.split(","),
            given.backbones.split(","),
            devices=[d for d in given.devices.split(",") if d],
            size_DHW=tuple(given.size),
            batch=given.batch,
            steps=given.steps,
            engine_settings=settings,
        )
    except TomoscaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(table([Row(**row) for row in found["rows"]]))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
