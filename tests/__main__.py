"""All tests, in two processes at a time: those on real services, which mostly wait, and the others, which compute.

`python -m tests` runs everything; with arguments it is pytest with these arguments, in one process.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

PYTEST = [sys.executable, "-m", "pytest"]


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when both have passed, else that of one that has not."""
    if arguments:
        return subprocess.call([*PYTEST, *arguments])
    # What killed processes and libraries leave in the folder for temporary files goes with it.
    with (
        tempfile.TemporaryDirectory(prefix="tt-", ignore_cleanup_errors=True) as scratch,
        tempfile.TemporaryFile() as said,
    ):
        environment = {**os.environ, "TMPDIR": scratch}
        # Its own cache would overwrite what the other one remembers of failures.
        service = subprocess.Popen(
            [*PYTEST, "tests/service", "-p", "no:cacheprovider"], stdout=said, stderr=subprocess.STDOUT, env=environment
        )
        try:
            others = subprocess.call([*PYTEST, "tests", "--ignore=tests/service"], env=environment)
            print("\nthe tests on real services:", flush=True)
            code = service.wait()
        finally:
            # After Ctrl-C it has got the signal too, and takes its servers down.
            service.wait(120)
        said.seek(0)
        sys.stdout.buffer.write(said.read())
        sys.stdout.flush()
    return code or others


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
