"""`python -m jobs.pretrain CONFIG [key=value ...]`."""

import sys

from jobs.driver import guarded  # before Ray, which reads its environment when it is imported
from jobs.pretrain.driver import main

if __name__ == "__main__":
    sys.exit(guarded(main))
