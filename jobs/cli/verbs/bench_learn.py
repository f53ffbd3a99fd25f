"""bench learn."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.cli.verbs.common import whole


def add(names: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Register the verb; the caller adds what all benchmarks have."""
    learn = names.add_parser("learn", help="do the methods learn: short runs, linear read-out beside random features")
    learn.add_argument("--quick", action="store_true", help="one seed, few steps: does it run, not what is learned")
    # Comma-separated, since settings follow: a list by spaces would take them for its own.
    learn.add_argument("--methods", type=_names, default=[], metavar="A,B", help="only these, such as mae,lrc+byol")
    learn.add_argument("--seeds", type=whole(1), metavar="N", help="seeds of each method (default 3)")
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
    return learn


def measure(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """The result, JSON-able, and its text."""
    from jobs.bench.learning.learn import FULL, QUICK, bench_learn
    from jobs.bench.learning.rows import format_learn, joined
    from ssl_core.config import overridden

    if arguments.join:
        result = joined([json.loads(path.read_text(encoding="utf-8")) for path in arguments.join])
        return result, format_learn(result)
    size = QUICK if arguments.quick else FULL
    count = len(size.seeds) if arguments.seeds is None else arguments.seeds
    seeds = tuple(range(arguments.first_seed, arguments.first_seed + count))
    size = replace(size, steps=arguments.steps or size.steps, batch=arguments.batch or size.batch, seeds=seeds)
    size = replace(size, norm=arguments.norm)
    overrides = overridden(arguments.overrides)
    result = bench_learn(arguments.methods, size, part=arguments.part, overrides=overrides, say=say)
    return result, format_learn(result)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
