"""What the processes of a stack write, read from their own files: seconds before a job's log shows it."""

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path

WORKER, DRIVER = "worker-*.out", "job-driver-*.log"


class Ahead:
    """The output of Ray's workers and drivers from now on."""

    def __init__(self, state: Path) -> None:
        # Each process that joins removes `session_latest` and makes it again: for a moment it is not there.
        self._sessions = state / "ray"
        self._before = {path: len(data) for path, data in self._files().items()}

    def _files(self) -> dict[Path, bytes]:
        found = {}
        logs = [path for path in self._sessions.glob("session_2*/logs/*") if path.match(WORKER) or path.match(DRIVER)]
        for path in logs:
            with contextlib.suppress(FileNotFoundError):  # Ray has just named it after its job
                found[path] = path.read_bytes()
        return found

    def lines(self) -> list[str]:
        """Everything so far, file after file."""
        texts = [data[self._before.get(path, 0) :].decode("utf-8", "replace") for path, data in self._files().items()]
        return [line for text in texts for line in text.splitlines()]

    def wait(self, sign: str, alive: Callable[[], bool], limit_s: float = 600) -> bool:
        """Whether a line with this pattern was seen while `alive`, which is asked when there is none."""
        pattern, end = re.compile(sign), time.monotonic() + limit_s
        while time.monotonic() < end:
            last = not alive()
            if any(pattern.search(line) for line in self.lines()):
                return True
            if last:
                return False
            time.sleep(0.05)
        return False
