"""`python -m jobs.predict MODEL IN OUT`, as a RayJob runs it."""

import sys

from jobs.predict.folder import main

sys.exit(main(sys.argv[1:]))
