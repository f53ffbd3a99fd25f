"""`python -m jobs.nodes [--store URL] [--client FILE] [--json]`."""

import sys

from jobs.driver import guarded
from jobs.nodes.ask import main

if __name__ == "__main__":
    sys.exit(guarded(main))
