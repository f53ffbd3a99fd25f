"""`python -m jobs.finetune CONFIG [key=value ...]`."""

import sys

from jobs.driver import guarded
from jobs.finetune.driver import main

if __name__ == "__main__":
    sys.exit(guarded(main))
