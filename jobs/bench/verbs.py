"""The benchmarks as verbs, for `tomoscale bench` and `python -m jobs.bench`.

A benchmark is imported when it runs. So only `overhead` and `checkpoint` import Ray, of which they measure parts, and
only `nnunet` imports fine-tuning, which knows of MLflow.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from jobs.options import whole
from jobs.output import emit, write_page
from ssl_core.config import load, overridden
from storage.errors import ConfigError

Names: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Say = Callable[[str], None]
Runner = Callable[[argparse.Namespace, Say], tuple[dict[str, Any], str]]
"""From the arguments and a listener of progress to the result, JSON-able, and its text."""

NEED_SERVICES = ("reads", "loader", "overhead", "checkpoint")
"""What measures object storage or a cluster: a caller that knows of a local stack points the process at it first."""


def add(names: Names) -> list[argparse.ArgumentParser]:
    """Register the verbs; `run` runs what was parsed."""
    actions = [*_storage_verbs(names), *_device_verbs(names), _learn_verb(names), _overhead_verb(names)]
    actions += [
        _size_verb(names),
        _checkpoint_verb(names),
        _predict_verb(names),
        _nnunet_verb(names),
        _stopping_verb(names),
    ]
    for action in actions:
        action.add_argument("--out", type=_writable, metavar="FILE", help="write the JSON there")
        action.add_argument("--json", action="store_true", help="print JSON")
    return actions


def run(arguments: argparse.Namespace) -> None:
    """Measure, write the file that `--out` names, and print the result."""
    runner: Runner = arguments.measure
    result, text = runner(arguments, _say)
    if arguments.out is not None:
        write_page(arguments.out, json.dumps(result, indent=1) + "\n")
    emit(result, arguments.json, text)


def _storage_verbs(names: Names) -> list[argparse.ArgumentParser]:
    reads = names.add_parser("reads", help="crop reads: ours and peers, local and from S3")
    reads.add_argument("--quick", action="store_true", help="under three minutes")
    reads.add_argument("--peers", nargs="+", metavar="NAME", help="only these")
    reads.add_argument("--rounds", type=whole(1), metavar="N", help="of every measurement (default 5)")
    loader = names.add_parser("loader", help="does the stream keep a trainer fed: data wait, throughput, memory")
    loader.add_argument("--quick", action="store_true", help="about two minutes")
    loader.add_argument("--crops", type=whole(1), metavar="N", help="of the memory run (default 10000; quick: 1000)")
    for action in (reads, loader):
        action.add_argument(
            "--store", metavar="URL", help="s3:// prefix to measure on (default: the local stack's, when up)"
        )
    ingest = names.add_parser("ingest", help="files to store: MB/s a core, beside MONAI's PersistentDataset")
    ingest.add_argument("--quick", action="store_true", help="about three minutes")
    layout = names.add_parser("layout", help="chunk edge, codec and shuffle: bytes and decoding time of a crop")
    layout.add_argument("--quick", action="store_true", help="about a minute")
    runners = ((reads, _reads), (loader, _loader), (ingest, _ingest), (layout, _layout))
    return [_measured_by(action, runner) for action, runner in runners]


def _device_verbs(names: Names) -> list[argparse.ArgumentParser]:
    step = names.add_parser("step", help="what a training step costs, by method, backbone, variant and device")
    step.add_argument("--quick", action="store_true", help="small views and few steps")
    # Comma-separated, since settings follow: a list by spaces would take them for its own.
    step.add_argument("--methods", type=_words, default=[], metavar="A,B", help="only these")
    step.add_argument("--backbones", type=_words, default=["basic_unet"], metavar="A,B", help="default basic_unet")
    step.add_argument(
        "--variants",
        type=_words,
        default=["plain"],
        metavar="A,B",
        help="plain, bf16, channels_last, bf16_channels_last, unfused, compile, checkpointing; default plain",
    )
    step.add_argument(
        "--devices", type=_words, default=[], metavar="A,B", help="such as cpu,cuda; default: all there are"
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
    gpu = names.add_parser("gpu", help="all that only an accelerator can tell, in minutes and one page")
    gpu.add_argument(
        "--limit", type=whole(1), default=400, metavar="S", help="begin nothing after so long (default 400)"
    )
    runners = ((step, _step), (losses, _losses), (views, _views), (gpu, _gpu))
    return [_measured_by(action, runner) for action, runner in runners]


def _learn_verb(names: Names) -> argparse.ArgumentParser:
    learn = names.add_parser("learn", help="do the methods learn: short runs, linear read-out beside random features")
    learn.add_argument("--quick", action="store_true", help="one seed, few steps: does it run, not what is learned")
    learn.add_argument("--methods", type=_words, default=[], metavar="A,B", help="only these, such as mae,lrc+byol")
    learn.add_argument("--seeds", type=whole(1), metavar="N", help="seeds of each method (default 5)")
    learn.add_argument("--first-seed", type=whole(0), default=0, metavar="N", help="the first seed (default 0)")
    learn.add_argument("--steps", type=whole(1), metavar="N", help="steps of a run (default 100)")
    learn.add_argument("--batch", type=whole(1), metavar="N", help="samples of a step (default 4)")
    learn.add_argument(
        "--norm", choices=("instance", "batch", "group"), default="instance", help="of the network (default instance)"
    )
    learn.add_argument(
        "--part", choices=("test", "val"), default="test", help="subjects scored; `val` to choose settings by"
    )
    learn.add_argument(
        "--join", type=Path, nargs="+", metavar="FILE", help="measure nothing; results of other seeds as one table"
    )
    learn.add_argument("overrides", nargs="*", metavar="key=value", help="of the methods, such as w_consistency=0.2")
    return _measured_by(learn, _learn)


def _overhead_verb(names: Names) -> argparse.ArgumentParser:
    overhead = names.add_parser(
        "overhead", help="Ray Train beside torchrun: step time and data wait, two processes each"
    )
    overhead.add_argument("data", help="URL of an ingested store")
    overhead.add_argument("--rounds", type=whole(1), default=3, metavar="N", help="runs of each (default 3)")
    # The first five are warm-up and not counted.
    overhead.add_argument("--steps", type=whole(10), default=60, metavar="N", help="steps of a run (default 60)")
    overhead.add_argument("--address", metavar="URL", help="job server; the local stack's when empty")
    return _measured_by(overhead, _overhead)


def _size_verb(names: Names) -> argparse.ArgumentParser:
    size = names.add_parser("size", help="many nodes and volumes, pretended: what a step, a start and a resume cost")
    size.add_argument("--quick", action="store_true", help="seconds: does it run, not what it costs")
    size.add_argument("--nodes", type=_numbers, metavar="A,B", help="default 1,10,100,1000")
    size.add_argument("--volumes", type=_numbers, metavar="A,B", help="default 1000,10000,100000,1000000")
    return _measured_by(size, _size)


def _checkpoint_verb(names: Names) -> argparse.ArgumentParser:
    action = names.add_parser("checkpoint", help="how long training waits for a checkpoint, and beside its upload")
    action.add_argument("--quick", action="store_true", help="seconds, a small state")
    action.add_argument("--mb", type=whole(1), metavar="N", help="of the state (default 200)")
    action.add_argument("--rounds", type=whole(1), metavar="N", help="checkpoints measured (default 5)")
    action.add_argument(
        "--store", metavar="URL", help="s3:// prefix, reached at 50 MB/s (default: a local stack's, else a folder)"
    )
    return _measured_by(action, _checkpoint)


def _predict_verb(names: Names) -> argparse.ArgumentParser:
    action = names.add_parser("predict", help="a mask of a large volume: how much memory and time it takes")
    action.add_argument("--quick", action="store_true", help="seconds, a small volume")
    action.add_argument("--size", type=whole(1), nargs=3, metavar=("D", "H", "W"), help="voxels (default 1000 512 512)")
    action.add_argument("--classes", type=whole(2), metavar="N", help="of the model (default 14)")
    action.add_argument("--batch", type=whole(1), default=1, metavar="N", help="windows at once (default 1)")
    return _measured_by(action, _predict)


def _nnunet_verb(names: Names) -> argparse.ArgumentParser:
    action = names.add_parser("nnunet", help="a training from random weights, then nnU-Net's in as many seconds")
    action.add_argument(
        "config", type=Path, metavar="CONFIG", help="data, network, settings, and what is cut of its plan"
    )
    action.add_argument(
        "--python", type=Path, required=True, metavar="FILE", help="interpreter of an environment with nnU-Net"
    )
    return _measured_by(action, _nnunet)


def _stopping_verb(names: Names) -> argparse.ArgumentParser:
    action = names.add_parser("stopping", help="what early stopping would have saved of a whole grid, and cost")
    action.add_argument("config", type=Path, metavar="CONFIG", help="of a search that stopped nothing")
    action.add_argument("result", type=Path, metavar="RESULT", help="its result.json")
    action.add_argument("--orders", type=whole(1), default=200, metavar="N", help="of its trials (default 200)")
    return _measured_by(action, _stopping)


def _measured_by(action: argparse.ArgumentParser, runner: Runner) -> argparse.ArgumentParser:
    action.set_defaults(measure=runner)
    return action


def _reads(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.storage.data import WRITERS
    from jobs.bench.storage.peers import PEERS
    from jobs.bench.storage.reads import FULL, QUICK, bench_reads, format_reads
    from jobs.bench.storage.torch_peers import TORCH_PEERS, TORCH_WRITERS

    size = QUICK if arguments.quick else FULL
    result = bench_reads(
        arguments.quick,
        arguments.peers,
        _prefix(arguments),
        available=(*PEERS, *TORCH_PEERS),
        writers={**WRITERS, **TORCH_WRITERS},
        size=replace(size, rounds=arguments.rounds or size.rounds),
        progress=say,
    )
    return result, format_reads(result)


def _loader(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.storage.loader import FULL, QUICK, bench_loader, format_loader

    size = QUICK if arguments.quick else FULL
    if arguments.crops is not None:
        size = replace(size, memory_crops=arguments.crops)
    result = bench_loader(s3_url=_prefix(arguments), size=size, progress=say)
    return result, format_loader(result)


def _ingest(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.storage.ingest import bench_ingest, format_ingest
    from jobs.bench.storage.monai_ingest import MONAI

    result = bench_ingest(arguments.quick, tools=[MONAI], progress=say)
    return result, format_ingest(result)


def _layout(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.storage.layouts import bench_layout, format_layout

    result = bench_layout(arguments.quick, progress=say)
    return result, format_layout(result)


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


def _gpu(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    import torch

    from jobs.bench.device.gpu import bench_gpu
    from jobs.bench.device.gpu_page import page

    if not torch.cuda.is_available():
        raise ConfigError("bench gpu", expected="a CUDA device", found="none", remedy="`bench step` measures a CPU")
    result = bench_gpu(limit_s=arguments.limit, say=say)
    return result, page(result)


def _learn(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.learning.arms import FULL, QUICK
    from jobs.bench.learning.learn import bench_learn
    from jobs.bench.learning.rows import format_learn, joined
    from jobs.bench.measure import read_result

    if arguments.join:
        result = joined([read_result(path, "runs") for path in arguments.join])
        return result, format_learn(result)
    size = QUICK if arguments.quick else FULL
    count = len(size.seeds) if arguments.seeds is None else arguments.seeds
    seeds = tuple(range(arguments.first_seed, arguments.first_seed + count))
    size = replace(size, steps=arguments.steps or size.steps, batch=arguments.batch or size.batch, seeds=seeds)
    size = replace(size, norm=arguments.norm)
    overrides = overridden(arguments.overrides)
    result = bench_learn(arguments.methods, size, part=arguments.part, overrides=overrides, say=say)
    return result, format_learn(result)


def _overhead(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    if not arguments.address:
        raise ConfigError("job server", expected="--address URL", found="none")
    from jobs.bench.overhead import bench_overhead, format_overhead

    result = bench_overhead(arguments.address, arguments.data, rounds=arguments.rounds, steps=arguments.steps, say=say)
    return result, format_overhead(result)


def _size(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.size.simulate import QUICK, Size, bench_size, format_size

    size = QUICK if arguments.quick else Size()
    size = replace(size, nodes=arguments.nodes or size.nodes, volumes=arguments.volumes or size.volumes)
    result = bench_size(size, say=say)
    return result, format_size(result)


def _checkpoint(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.checkpoint import QUICK, Size, bench_checkpoint, format_checkpoint

    size = QUICK if arguments.quick else Size()
    size = replace(size, rounds=arguments.rounds or size.rounds)
    if arguments.mb is not None:
        size = replace(size, state_bytes=arguments.mb * 10**6)
    result = bench_checkpoint(size, _prefix(arguments), say=say)
    return result, format_checkpoint(result)


def _predict(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.prediction import FULL, QUICK, bench_predict, format_predict

    size = QUICK if arguments.quick else FULL
    if arguments.size is not None:
        size = replace(size, shape_DHW=tuple(arguments.size))
    size = replace(size, classes=arguments.classes or size.classes)
    result = bench_predict(size, batch=arguments.batch, say=say)
    return result, format_predict(result)


def _nnunet(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.nnunet.compare import bench_nnunet, format_nnunet
    from jobs.bench.nnunet.config import CompareConfig

    if not os.access(arguments.python, os.X_OK):
        raise ConfigError("--python", expected="an interpreter", found=str(arguments.python), remedy="check the path")
    result = bench_nnunet(load(CompareConfig, arguments.config), arguments.python, say=say)
    return result, format_nnunet(result)


def _stopping(arguments: argparse.Namespace, _say: Say) -> tuple[dict[str, Any], str]:
    from jobs.bench.stopping import bench_stopping, format_stopping
    from jobs.configs.search import TuneConfig

    result = bench_stopping(load(TuneConfig, arguments.config), arguments.result, orders=arguments.orders)
    return result, format_stopping(result)


def _prefix(arguments: argparse.Namespace) -> str | None:
    """Where to measure S3: `--store`, else the endpoint of the AWS environment, else nowhere."""
    if arguments.store:
        return str(arguments.store)
    return f"s3://volumes/bench-{arguments.name}" if "AWS_ENDPOINT_URL_S3" in os.environ else None


def _writable(text: str) -> Path:
    """A file that can be made; checked before the minutes of a measurement and not after."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in a folder that is there")
    return path


def _words(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, ascending."""
    return tuple(sorted({whole(1)(word) for word in _words(text)}))


def _say(line: str) -> None:
    """Progress goes beside the result, so that `--json` can be piped."""
    print(line, file=sys.stderr, flush=True)
