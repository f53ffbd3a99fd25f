"""All tests, in three processes at a time: those on real services mostly wait, those of several ranks often do.

`python -m tests` runs everything; with arguments it is pytest with these arguments, in one process.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest"]
BESIDE = {"on real services": ["tests/service"], "of contracts and ranks": ["tests/contract", "tests/distributed"]}


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when all have passed, else that of one that has not."""
    if arguments:
        return subprocess.call([*PYTEST, *arguments])
    # What killed processes and libraries leave in the folder for temporary files goes with it.
    with tempfile.TemporaryDirectory(prefix="tt-", ignore_cleanup_errors=True) as scratch:
        return _all(Path(scratch))


def _all(scratch: Path) -> int:
    # Several processes with a thread a core each would spend their time waiting for one another.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": str(scratch)}
    beside = {}
    try:
        for number, (name, folders) in enumerate(BESIDE.items()):
            log = scratch / f"{number}.log"
            with log.open("wb") as out:
                # Its own cache would overwrite what the others remember of failures.
                command = [*PYTEST, *folders, "-p", "no:cacheprovider"]
                beside[name] = log, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        left_out = [f"--ignore={folder}" for folders in BESIDE.values() for folder in folders]
        codes = [subprocess.call([*PYTEST, "tests", *left_out], env=environment)]
        codes += [process.wait() for _, process in beside.values()]
    finally:
        # After Ctrl-C they have got the signal too, and take their servers down.
        for name, (log, process) in beside.items():
            process.wait(120)
            print(f"\nthe tests {name}:\n{log.read_text(errors='replace')}", flush=True)
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
