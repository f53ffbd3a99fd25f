"""The benchmarks of the training device as verbs, for `tomoscale bench` and, with no cluster in sight, for
`python -m jobs.bench.device`."""

import argparse
from collections.abc import Callable
from typing import Any

from ssl_core.config import load

Say = Callable[[str], None]
Runner = Callable[[argparse.Namespace, Say], tuple[dict[str, Any], str]]
"""From the arguments and a listener of progress to the result, JSON-able, and its text."""


def add(names: "argparse._SubParsersAction[argparse.ArgumentParser]") -> list[tuple[argparse.ArgumentParser, Runner]]:
    """Register the verbs; the caller adds its own options and runs the runner."""
    step = names.add_parser("step", help="what a training step costs, by method, backbone, variant and device")
    step.add_argument("--quick", action="store_true", help="small views and few steps")
    # Comma-separated, since settings follow: a list by spaces would take them for its own.
    step.add_argument("--methods", type=_names, default=[], metavar="A,B", help="only these")
    step.add_argument("--backbones", type=_names, default=["basic_unet"], metavar="A,B", help="default basic_unet")
    step.add_argument(
        "--variants",
        type=_names,
        default=["plain"],
        metavar="A,B",
        help="plain, bf16, channels_last, bf16_channels_last, unfused, compile, checkpointing; default plain",
    )
    step.add_argument(
        "--devices", type=_names, default=[], metavar="A,B", help="such as cpu,cuda; default: all there are"
    )
    step.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="voxels of a view (default 64 64 64)")
    step.add_argument("--batch", type=int, help="samples a step (default 4)")
    step.add_argument("--steps", type=int, help="steps measured (default 10)")
    step.add_argument("--data", metavar="URL", help="store to stream crops from; made in memory when empty")
    step.add_argument("--nnssl", action="store_true", help="SimCLR with nnssl's network and crops, beside its figures")
    step.add_argument("overrides", nargs="*", metavar="key=value", help="of the engine, such as precision=bf16")
    losses = names.add_parser("losses", help="our losses beside lightly's and MONAI's: time, memory, error")
    losses.add_argument("--quick", action="store_true", help="small batches")
    views = names.add_parser("views", help="batched 3-D views beside MONAI's and kornia's transforms")
    views.add_argument("--quick", action="store_true", help="small crops and few of them")
    for action in (losses, views):
        action.add_argument("--device", default="cpu", help="such as cuda (default cpu)")
    return [(step, _step), (losses, _losses), (views, _views)]


def _step(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.device.nnssl import bench_nnssl, nnssl_table
    from jobs.bench.device.step import Row, bench_step, table
    from ssl_core.methods.base import method_names
    from ssl_core.train.engine import EngineConfig

    size, batch, steps = ((32, 32, 32), 2, 3) if arguments.quick else ((64, 64, 64), 4, 10)
    common: dict[str, Any] = {
        "variants": arguments.variants,
        "devices": arguments.devices,
        "data": arguments.data,
        "say": say,
        "steps": arguments.steps or steps,
        "engine_settings": load(EngineConfig, {}, arguments.overrides).model_dump(exclude_unset=True),
    }
    if arguments.nnssl:
        result = bench_nnssl(batch=arguments.batch or 12, **common)
        return result, nnssl_table(result)
    result = bench_step(
        arguments.methods or method_names(),
        arguments.backbones,
        size_DHW=tuple(arguments.size or size),
        batch=arguments.batch or batch,
        **common,
    )
    return result, table([Row(**row) for row in result["rows"]])


def _losses(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.device.losses import bench_losses, format_losses

    result = bench_losses(arguments.quick, device=arguments.device, say=say)
    return result, format_losses(result)


def _views(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.device.views import bench_views, format_views

    result = bench_views(arguments.quick, device=arguments.device, say=say)
    return result, format_views(result)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
