"""How far a job is, and how long the rest takes.

Whoever works writes it into the log; the end of a log says it to everybody who may read the job, on every cluster.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.output import duration


@dataclass(frozen=True)
class Progress:
    """Done of a total.

    Attributes:
        left: How long the rest takes, in words; empty where nothing says so yet.
    """

    done: int
    total: int
    left: str = ""

    @property
    def percent(self) -> float:
        """0 to 100."""
        return 100.0 * self.done / self.total if self.total else 100.0

    def __str__(self) -> str:
        return f"{self.done}/{self.total} ({self.percent:.1f} %{f', {self.left} left' if self.left else ''})"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"done": self.done, "total": self.total, "percent": round(self.percent, 1), "left": self.left or None}


class Pace:
    """How fast a job goes: the time since the first count that it was told of, with saving and probing in it.

    What comes before that count is left out: a first step compiles and fills caches.

    Args:
        total: The last count.
        clock: Seconds from a fixed point.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._first: tuple[int, float] | None = None

    def at(self, done: int) -> Progress:
        """The progress at a count, which is one of this start's."""
        now = self._clock()
        first, began = self._first = self._first or (done, now)
        left = ""
        if first < done < self._total:
            left = duration((now - began) / (done - first) * (self._total - done))
        return Progress(done, self._total, left)


# Pre-training; ingest and whatever else has a bar, which is a plain line in a log; trainings of a fine-tuning and cells
# of a study.
_LINES = (
    re.compile(r"\bstep (\d+)/(\d+)(?: \([\d.]+ %(?:, ([^)]+) left)?\))?"),
    re.compile(r"^[a-z][\w -]*: (\d+)/(\d+)(?: \w+)?(?:, ([^,]+) left)?", re.IGNORECASE),
    re.compile(r"\((\d+)/(\d+)(?:, about ([^()]+) left|[,;] [^()]+)?\)$"),
)
# How far one cell of a study is, which is indented, says nothing of the study.
_OF_A_PART = re.compile(r"^(?:\x1b\[\d+m)?(?:\([^)]*pid=\d+[^)]*\)(?:\x1b\[0m)? )?  \S")


def progress_in(log: str) -> Progress | None:
    """The last progress in a log; None where it says nothing of it."""
    for line in reversed(log.splitlines()):
        if _OF_A_PART.match(line):
            continue
        for pattern in _LINES:
            match = pattern.search(line.rstrip())
            if match and 0 <= int(match[1]) <= int(match[2]):
                left = match[3] if pattern.groups == 3 else None
                return Progress(int(match[1]), int(match[2]), left or "")
    return None
