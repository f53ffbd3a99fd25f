"""plan."""

import argparse
import sys

from jobs.cli.verbs.common import add_json, add_state, check_starts
from jobs.cli.verbs.train import MODULES, add_config, load_config
from jobs.options import amount, whole
from jobs.output import emit
from storage.errors import ConfigError

_TEXT = """\
`plan CONFIG` takes real steps of a pre-training job in this process, as one worker would, and prints what the whole
run would take: hours, bytes and requests from the store, memory, money, and what bounds it. `plan KIND CONFIG`, with
pretrain, tune or finetune before the file, prints the resolved configuration of a job and measures nothing."""


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verb."""
    plan = verbs.add_parser(
        "plan",
        help="measure what a pre-training job will take, or print the resolved configuration of a job",
        usage="%(prog)s [options] CONFIG [key=value ...]\n       %(prog)s [--json] KIND CONFIG [key=value ...]",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(plan)
    plan.add_argument("--steps", type=whole(1), default=20, metavar="N", help="steps to time (default 20)")
    plan.add_argument(
        "--workers", type=_counts, metavar="N,N", help="numbers of workers, beside the job's own (default 1,4,16,64)"
    )
    plan.add_argument(
        "--gradients-gbit",
        type=amount(1e-3),
        default=10.0,
        metavar="X",
        help="bandwidth between workers, Gbit/s (default 10)",
    )
    plan.add_argument(
        "--store-gbit",
        type=amount(1e-3),
        metavar="X",
        help="what the store gives all workers together, Gbit/s (default: to each what it gave to one)",
    )
    plan.add_argument("--node-hour", type=amount(), metavar="PRICE", help="price of an hour of a node")
    plan.add_argument("--gigabyte", type=amount(), metavar="PRICE", help="price of 10^9 bytes read from the store")
    plan.add_argument("--thousand-requests", type=amount(), metavar="PRICE", help="price of 1000 requests to the store")
    plan.add_argument("--workers-per-node", type=whole(1), default=1, metavar="N", help="for the price (default 1)")
    add_state(plan)
    add_json(plan)
    plan.set_defaults(run=_plan)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(whole(1, 1 << 16)(part) for part in text.split(","))


def _plan(arguments: argparse.Namespace) -> int:
    kind = arguments.config
    if kind not in MODULES:
        return _measure(arguments)
    if not arguments.overrides:
        raise ConfigError(
            f"plan {kind}",
            expected="a YAML file behind it",
            found="none",
            remedy=f"for a file of that name: plan ./{kind}",
        )
    arguments.config, *arguments.overrides = arguments.overrides
    return _settings(kind, arguments)


def _settings(kind: str, arguments: argparse.Namespace) -> int:
    from ssl_core.config import digest, dump_yaml, resolved

    config = load_config(kind, arguments)
    check_starts(config, arguments)
    emit(
        {"digest": digest(config), "config": resolved(config)},
        arguments.json,
        f"{dump_yaml(config)}# digest {digest(config)}",
    )
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    from jobs.configs import PretrainConfig
    from jobs.plan import make, page
    from jobs.plan.estimate import Links, Prices

    config = load_config("pretrain", arguments)
    assert isinstance(config, PretrainConfig)
    check_starts(config, arguments)
    links = Links(arguments.gradients_gbit, arguments.store_gbit)
    prices = Prices(arguments.node_hour, arguments.gigabyte, arguments.thousand_requests, arguments.workers_per_node)
    columns = make.make(
        config,
        arguments.workers or make.WORKERS,
        steps=arguments.steps,
        links=links,
        prices=prices,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    emit(page.to_json(config, columns, links, prices), arguments.json, page.text(config, columns, links, prices))
    return 0
