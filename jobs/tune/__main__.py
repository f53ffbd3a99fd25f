"""Search of fine-tuning settings as a Ray job: `python -m jobs.tune CONFIG [key=value ...]`."""

import sys

from jobs import driver
from jobs.tune.driver import main

if __name__ == "__main__":
    sys.exit(driver.guarded(main))
