"""bench NAME: the benchmarks of `jobs.bench`, on the local stack where one is up."""

import argparse

from jobs.bench import verbs as benchmarks
from jobs.cli.verbs.common import add_state, job_address, use_stack


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    bench = verbs.add_parser("bench", help="measure on this machine, beside peers, as ratios of one run")
    names = bench.add_subparsers(dest="name", required=True, metavar="NAME")
    for action in benchmarks.add(names):
        add_state(action)
        action.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.name in benchmarks.NEED_SERVICES:
        use_stack(arguments)
    if "address" in arguments:
        arguments.address = job_address(arguments)
    benchmarks.run(arguments)
    return 0
