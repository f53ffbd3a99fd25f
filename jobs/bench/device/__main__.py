"""`python -m jobs.bench.device VERB`: the benchmarks of the training device where there is no cluster."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.bench.device import cli
from storage.errors import TomoscaleError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; prints its table."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.device")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for action, run in cli.add(names):
        action.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there")
        action.set_defaults(run=run)
    given = parser.parse_args(argv)
    try:
        result, text = given.run(given, lambda line: print(line, file=sys.stderr, flush=True))
    except TomoscaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(text)
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
