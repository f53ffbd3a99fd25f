"""All tests, in three processes at a time: those on real services mostly wait, those of several ranks often do.

`python -m tests` runs everything; with arguments it is pytest with these arguments, in one process.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest"]
LANES = 3
SERVICES = sorted(Path(__file__).parent.glob("service/test_*.py"))
LONG = [path for path in SERVICES if path.stem.endswith("_survives")]
GROUPS: dict[str, list[str]] = {  # the longest first: what remains of the last one runs alone
    "of one process": ["tests", "--ignore=tests/service", "--ignore=tests/contract", "--ignore=tests/distributed"],
    "of jobs that are killed": [os.path.relpath(path) for path in LONG],
    "of contracts and ranks": ["tests/contract", "tests/distributed"],
    "on real services": ["tests/service", *(f"--ignore={os.path.relpath(path)}" for path in LONG)],
}


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when all have passed, else that of one that has not."""
    if arguments:
        return subprocess.call([*PYTEST, *arguments])
    # What killed processes and libraries leave in the folder for temporary files goes with it.
    with tempfile.TemporaryDirectory(prefix="tt-", ignore_cleanup_errors=True) as scratch:
        return _all(Path(scratch))


def _all(scratch: Path) -> int:
    lanes = ThreadPoolExecutor(LANES)
    try:
        return max(lanes.map(partial(_run, scratch), range(len(GROUPS))), key=abs)
    finally:
        # After Ctrl-C those that run have got the signal too, and take their servers down; no other is started.
        lanes.shutdown(cancel_futures=True)


def _run(scratch: Path, number: int) -> int:
    """The first group as it goes, another's output when it is done."""
    name = list(GROUPS)[number]
    # Several processes with a thread a core each would spend their time waiting for one another.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": str(scratch)}
    # The cache of one would overwrite what another remembers of failures.
    command = [*PYTEST, *GROUPS[name], *(["-p", "no:cacheprovider"] if number else [])]
    if number == 0:
        return subprocess.call(command, env=environment)
    log = scratch / f"{number}.log"
    with log.open("wb") as out:
        code = subprocess.call(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    print(f"\nthe tests {name}:\n{log.read_text(errors='replace')}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
