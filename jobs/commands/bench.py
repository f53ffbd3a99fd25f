"""bench reads | overhead."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from jobs.commands.common import add_json, add_state, job_address, use_stack
from jobs.text import emit, table


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    bench = verbs.add_parser("bench", help="measure on this machine, beside peers, as ratios of one run")
    names = bench.add_subparsers(dest="name", required=True, metavar="NAME")
    reads = names.add_parser("reads", help="crop reads: ours and peers, local and from S3")
    reads.add_argument("--quick", action="store_true", help="about two minutes")
    reads.add_argument("--peers", nargs="+", help="only these")
    reads.add_argument(
        "--store", metavar="URL", help="s3:// prefix to measure on (default: the local stack's, when up)"
    )
    overhead = names.add_parser(
        "overhead", help="Ray Train beside torchrun: step time and data wait, two processes each"
    )
    overhead.add_argument("data", help="URL of an ingested store")
    overhead.add_argument("--rounds", type=int, default=3)
    overhead.add_argument("--steps", type=int, default=60)
    overhead.add_argument("--address", metavar="URL", help="job server; the local stack's when empty")
    for action, run in ((reads, _reads), (overhead, _overhead)):
        action.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there")
        add_json(action)
        add_state(action)
        action.set_defaults(run=run)


def _reads(arguments: argparse.Namespace) -> int:
    from storage.bench.reads import bench_reads, format_reads

    use_stack(arguments)
    url = arguments.store or ("s3://volumes/bench-reads" if "AWS_ENDPOINT_URL_S3" in os.environ else None)
    result = bench_reads(arguments.quick, arguments.peers, url, arguments.out, progress=_say)
    emit(result, arguments.json, format_reads(result))
    return 0


def _overhead(arguments: argparse.Namespace) -> int:
    from jobs.bench.overhead import bench_overhead

    use_stack(arguments)
    result = bench_overhead(
        job_address(arguments), arguments.data, rounds=arguments.rounds, steps=arguments.steps, say=_say
    )
    _write(arguments.out, result)
    pairs = zip(result["rounds"]["ray"], result["rounds"]["torchrun"], result["ratios"], strict=True)
    rows = [(i + 1, a["step_s"], b["step_s"], ratio, 100 * a["wait_share"]) for i, (a, b, ratio) in enumerate(pairs)]
    text = table(("round", "Ray Train step s", "torchrun step s", "ratio", "data wait %"), rows)
    median = f"median ratio {result['ratio_median']:.3f}, median data wait {result['wait_share_median']:.2%}"
    emit(result, arguments.json, f"{text}\n{median}")
    return 0


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _say(line: str) -> None:
    print(line, flush=True)
