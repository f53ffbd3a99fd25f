"""Tables, JSON and progress for a person at a terminal or a log."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Left-aligned columns; numbers right-aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(str(h)), *(len(row[i]) for row in cells)) if cells else len(h) for i, h in enumerate(header)]
    numeric = [all(isinstance(row[i], int | float) or row[i] is None for row in rows) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        aligned = [v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, numeric, strict=True)]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(list(header)), line(["-" * w for w in widths]), *(line(row) for row in cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def emit(data: Any, as_json: bool, text: str) -> None:
    """Print `data` as JSON when asked, else the text."""
    print(json.dumps(data, indent=2, default=str) if as_json else text)


class Progress:
    """One line that rewrites itself on a terminal; a plain line every few seconds elsewhere."""

    def __init__(self, what: str, total: int, unit: str = "") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._start = time.monotonic()
        self._last = -10.0
        self._live = sys.stderr.isatty()

    def update(self, done: int, extra: str = "") -> None:
        """Show `done` of the total, the time left, and `extra`."""
        now = time.monotonic() - self._start
        if done < self._total and now - self._last < (0.1 if self._live else 5.0):
            return
        self._last = now
        left = f", {now / done * (self._total - done):.0f} s left" if 0 < done < self._total else f", {now:.1f} s"
        tail = f", {extra}" if extra else ""
        if self._live:
            filled = int(24 * done / max(1, self._total))
            bar = "█" * filled + "░" * (24 - filled)
            end = "\n" if done >= self._total else ""
            line = f"\r\033[K{self._what} {bar} {done}/{self._total} {self._unit}{left}{tail}"
            print(line, end=end, file=sys.stderr, flush=True)
        else:
            print(f"{self._what}: {done}/{self._total} {self._unit}{left}{tail}", file=sys.stderr, flush=True)
