"""bench reads | loader | ingest | layout: what the storage layer does, beside its peers."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace

from jobs.cli.verbs.common import use_stack, whole
from jobs.output import emit

Run = Callable[[argparse.Namespace], int]


def add(names: "argparse._SubParsersAction[argparse.ArgumentParser]") -> list[tuple[argparse.ArgumentParser, Run]]:
    """Register the verbs; returns them with what runs them, for the options that all benchmarks share."""
    reads = names.add_parser("reads", help="crop reads: ours and peers, local and from S3")
    reads.add_argument("--quick", action="store_true", help="under three minutes")
    reads.add_argument("--peers", nargs="+", metavar="NAME", help="only these")
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
    return [(reads, _reads), (loader, _loader), (ingest, _ingest), (layout, _layout)]


def _reads(arguments: argparse.Namespace) -> int:
    from jobs.bench.storage.data import WRITERS
    from jobs.bench.storage.peers import PEERS
    from jobs.bench.storage.reads import bench_reads, format_reads
    from jobs.bench.storage.torch_peers import TORCH_PEERS, TORCH_WRITERS

    result = bench_reads(
        arguments.quick,
        arguments.peers,
        _prefix(arguments),
        arguments.out,
        known=(*PEERS, *TORCH_PEERS),
        writers={**WRITERS, **TORCH_WRITERS},
        progress=_say,
    )
    emit(result, arguments.json, format_reads(result))
    return 0


def _loader(arguments: argparse.Namespace) -> int:
    from jobs.bench.storage.loader import FULL, QUICK, bench_loader, format_loader

    size = QUICK if arguments.quick else FULL
    if arguments.crops is not None:
        size = replace(size, memory_crops=arguments.crops)
    result = bench_loader(s3_url=_prefix(arguments), out=arguments.out, size=size, progress=_say)
    emit(result, arguments.json, format_loader(result))
    return 0


def _ingest(arguments: argparse.Namespace) -> int:
    from jobs.bench.storage.ingest import bench_ingest, format_ingest
    from jobs.bench.storage.monai_ingest import MONAI

    result = bench_ingest(arguments.quick, arguments.out, tools=[MONAI], progress=_say)
    emit(result, arguments.json, format_ingest(result))
    return 0


def _layout(arguments: argparse.Namespace) -> int:
    from jobs.bench.storage.layouts import bench_layout, format_layout

    result = bench_layout(arguments.quick, arguments.out, progress=_say)
    emit(result, arguments.json, format_layout(result))
    return 0


def _prefix(arguments: argparse.Namespace) -> str | None:
    """Where to measure S3: as told, else on the local stack, else nowhere."""
    use_stack(arguments)
    given: str | None = arguments.store
    return given or (f"s3://volumes/bench-{arguments.name}" if "AWS_ENDPOINT_URL_S3" in os.environ else None)


def _say(line: str) -> None:
    """Progress goes beside the result, so that `--json` can be piped."""
    print(line, file=sys.stderr, flush=True)
