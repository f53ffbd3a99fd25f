"""`python -m jobs.bench NAME`: the benchmarks on a machine without a cluster. Object storage is that of the AWS
environment."""

import argparse
import sys
from collections.abc import Sequence

from jobs.bench import verbs
from storage.errors import TomoscaleError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit code of the command line."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description="Measure on this machine, beside peers.")
    verbs.add(parser.add_subparsers(dest="name", required=True, metavar="NAME"))
    try:
        verbs.run(parser.parse_args(argv))
    except TomoscaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
