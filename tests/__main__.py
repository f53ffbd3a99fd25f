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
HERE = Path(__file__).parent
PARTS = 4


def _files(pattern: str) -> list[str]:
    return [os.path.relpath(path) for path in sorted(HERE.glob(pattern))]


KILLED, SEARCHED = _files("service/test_pretrain_survives.py"), _files("service/test_search_survives.py")
SERVED, HELD, RANKED = _files("service/test_*.py"), _files("contract/test_*.py"), _files("distributed/test_*.py")
REST = sorted(set(_files("**/test_*.py")) - {*SERVED, *HELD, *RANKED})
# The first shows how it goes. Then the longest first, so that the lanes end at about the same time.
GROUPS: dict[str, list[str]] = {
    f"of one process, 1 of {PARTS}": REST[::PARTS],
    "of jobs that are killed": KILLED,
    "on real services": [path for path in SERVED if path not in (*KILLED, *SEARCHED)],
    "of contracts": HELD,
    "of ranks": RANKED,
    "of searches that are killed": SEARCHED,
    **{f"of one process, {part + 1} of {PARTS}": REST[part::PARTS] for part in range(1, PARTS)},
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
