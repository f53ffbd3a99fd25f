"""bench reads | loader | ingest | layout | step | losses | views | learn | overhead."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from jobs.bench.device.cli import Runner
from jobs.bench.device.cli import add as device_benchmarks
from jobs.cli.verbs import bench_learn, bench_storage
from jobs.cli.verbs.common import add_json, add_state, job_address, use_stack, whole
from jobs.output import emit, table, write_page


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    bench = verbs.add_parser("bench", help="measure on this machine, beside peers, as ratios of one run")
    names = bench.add_subparsers(dest="name", required=True, metavar="NAME")
    overhead = names.add_parser(
        "overhead", help="Ray Train beside torchrun: step time and data wait, two processes each"
    )
    overhead.add_argument("data", help="URL of an ingested store")
    overhead.add_argument("--rounds", type=whole(1), default=3, metavar="N", help="runs of each (default 3)")
    # The first five are warm-up and not counted.
    overhead.add_argument("--steps", type=whole(10), default=60, metavar="N", help="steps of a run (default 60)")
    overhead.add_argument("--address", metavar="URL", help="job server; the local stack's when empty")
    on_device = [(action, partial(_on_device, runner)) for action, runner in device_benchmarks(names)]
    on_device.append((bench_learn.add(names), partial(_on_device, bench_learn.measure)))
    for action, run in (*bench_storage.add(names), *on_device, (overhead, _overhead)):
        action.add_argument("--out", type=_writable, metavar="FILE", help="write the JSON there")
        add_json(action)
        add_state(action)
        action.set_defaults(run=run)


def _on_device(runner: Runner, arguments: argparse.Namespace) -> int:
    result, text = runner(arguments, _say)
    _write(arguments.out, result)
    emit(result, arguments.json, text)
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


def _writable(text: str) -> Path:
    """A file that can be made, said before the minutes of a measurement and not after."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in a folder that is there")
    return path


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        write_page(path, json.dumps(result, indent=1))


def _say(line: str) -> None:
    """Progress goes beside the result, so that `--json` can be piped."""
    print(line, file=sys.stderr, flush=True)
