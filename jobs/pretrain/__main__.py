"""`python -m jobs.pretrain CONFIG [key=value ...]`."""

import sys

from jobs.driver import guarded
from jobs.pretrain.driver import main

if __name__ == "__main__":
    sys.exit(guarded(main))
