"""bench reads | loader | ingest | layout | step | overhead."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jobs.commands import bench_storage
from jobs.commands.common import add_json, add_state, job_address, use_stack
from jobs.text import emit, table


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    bench = verbs.add_parser("bench", help="measure on this machine, beside peers, as ratios of one run")
    names = bench.add_subparsers(dest="name", required=True, metavar="NAME")
    step = names.add_parser("step", help="what a training step costs, by method, backbone and device")
    step.add_argument("--quick", action="store_true", help="small views and few steps")
    # Comma-separated, since settings follow: a list by spaces would take them for its own.
    step.add_argument("--methods", type=_names, default=[], metavar="A,B", help="only these")
    step.add_argument("--backbones", type=_names, default=["basic_unet"], metavar="A,B", help="default basic_unet")
    step.add_argument(
        "--devices", type=_names, default=[], metavar="A,B", help="such as cpu,cuda; default: all there are"
    )
    step.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="voxels of a view (default 64 64 64)")
    step.add_argument("--batch", type=int, help="samples a step (default 4)")
    step.add_argument("--steps", type=int, help="steps measured (default 10)")
    step.add_argument("overrides", nargs="*", metavar="key=value", help="of the engine, such as precision=bf16")
    overhead = names.add_parser(
        "overhead", help="Ray Train beside torchrun: step time and data wait, two processes each"
    )
    overhead.add_argument("data", help="URL of an ingested store")
    overhead.add_argument("--rounds", type=int, default=3)
    overhead.add_argument("--steps", type=int, default=60)
    overhead.add_argument("--address", metavar="URL", help="job server; the local stack's when empty")
    for action, run in (*bench_storage.add(names), (step, _step), (overhead, _overhead)):
        action.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there")
        add_json(action)
        add_state(action)
        action.set_defaults(run=run)


def _step(arguments: argparse.Namespace) -> int:
    from ssl_core.bench.step import Row, bench_step
    from ssl_core.bench.step import table as step_table
    from ssl_core.config import load
    from ssl_core.engine import EngineConfig
    from ssl_core.methods.base import method_names

    size, batch, steps = ((32, 32, 32), 2, 3) if arguments.quick else ((64, 64, 64), 4, 10)
    result = bench_step(
        arguments.methods or method_names(),
        arguments.backbones,
        devices=arguments.devices,
        say=_say,
        size_DHW=tuple(arguments.size or size),
        batch=arguments.batch or batch,
        steps=arguments.steps or steps,
        engine_settings=load(EngineConfig, {}, arguments.overrides).model_dump(exclude_unset=True),
    )
    _write(arguments.out, result)
    emit(result, arguments.json, step_table([Row(**row) for row in result["rows"]]))
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


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _say(line: str) -> None:
    """Progress goes beside the result, so that `--json` can be piped."""
    print(line, file=sys.stderr, flush=True)
