"""demo."""

import argparse
from pathlib import Path

from jobs.cli.verbs.common import add_state, state_dir


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verb."""
    demo = verbs.add_parser(
        "demo", help="the whole path on this machine: volumes to a registered segmenter and a report"
    )
    demo.add_argument("--data", type=Path, metavar="DIR", help="folder of volumes (images/ and labels/)")
    demo.add_argument("--store", metavar="URL", help="where to ingest to (default: a bucket of the local stack)")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="folder of the report")
    demo.add_argument("--keep", action="store_true", help="leave the stack up to look around")
    add_state(demo)
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from jobs.demo.run import Demo

    Demo(
        out=arguments.out,
        state=state_dir(arguments),
        data=arguments.data,
        store=arguments.store,
        keep=arguments.keep,
        say=lambda line: print(line, flush=True),
    ).run()
    return 0
