"""Tables, JSON and progress for a person at a terminal or a log.

By hand: a table is also a text that tests and pages compare, and a log wants plain lines, which no library of
terminals writes.
"""

import io
import itertools
import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.errors import ConfigError, StackError


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Left-aligned columns; numbers right-aligned. Cells may have several lines, see `wrap`."""
    cells = [[_cell(value).split("\n") for value in row] for row in rows]
    widths = [max(len(str(h)), *(len(part) for row in cells for part in row[i]), 0) for i, h in enumerate(header)]
    numeric = [all(isinstance(row[i], int | float) or row[i] is None for row in rows) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        aligned = [v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, numeric, strict=True)]
        return "  ".join(aligned).rstrip()

    body = [line(values) for row in cells for values in itertools.zip_longest(*row, fillvalue="")]
    return "\n".join([line(list(header)), line(["-" * w for w in widths]), *body])


def wrap(text: str, width: int) -> str:
    """The text on lines of at most `width` characters, paragraphs kept apart and code words whole."""
    paragraphs = (" ".join(p.split()) for p in text.split("\n\n"))
    folded = (textwrap.fill(p, max(20, width), break_long_words=False, break_on_hyphens=False) for p in paragraphs)
    return "\n\n".join(folded)


def columns() -> int:
    """Characters of a line here: the terminal's, 100 where there is none, never more than are easy to read."""
    return min(120, shutil.get_terminal_size((100, 24)).columns)


def duration(seconds: float) -> str:
    """Two units at most: `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`.

    >>> duration(11100)
    '3 h 05 min'
    """
    whole = round(max(0.0, seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def last_line(error: BaseException) -> str:
    """The last line that says something; of a remote traceback or a list of causes, the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" #")]
    return lines[-1][:300] if lines else type(error).__name__


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def open_streams() -> None:
    """Let anything be printed to standard output and standard error, wherever they go.

    What the encoding of a terminal does not have, such as an umlaut in ASCII, is written as an escape; a stream that
    was closed before this process began takes everything and keeps nothing.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process
        elif isinstance(stream, io.TextIOWrapper) and (
            stream.errors == "strict" or "utf" not in stream.encoding.lower()
        ):
            stream.reconfigure(errors="backslashreplace")


def emit(data: Any, as_json: bool, text: str) -> None:
    """Print `data` as JSON when asked, else the text."""
    print(to_json(data) if as_json else text)


def to_json(data: Any) -> str:
    """JSON that every reader takes: what is not finite becomes null, what JSON does not know becomes text."""
    return json.dumps(_finite(data), indent=2, default=str, allow_nan=False)


def write_page(path: Path, text: str) -> None:
    """Write a file whole or not at all; what was there before stays until then.

    Raises:
        ConfigError: its folder is not there.
        StackError: the system would not take it: no room, no right.
    """
    if not path.parent.is_dir():
        raise ConfigError(str(path.parent), expected="a folder", found="none", remedy="create it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StackError(
            str(path),
            expected="a file that this user can write, on a disk with room",
            found=error.strerror or str(error),
            remedy="free space, change the owner of the folder, or give another place",
        ) from error


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _blocks(encoding: str) -> str:
    """What a bar is drawn with, filled and empty, as far as the terminal's encoding has it."""
    try:
        "█░".encode(encoding)
    except UnicodeEncodeError:
        return "#-"
    return "█░"


class Progress:
    """One line that rewrites itself on a terminal; a plain line every few seconds elsewhere."""

    def __init__(self, what: str, total: int, unit: str = "") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._start = time.monotonic()
        self._last = -10.0
        self._live = sys.stderr.isatty()
        self._blocks = _blocks(sys.stderr.encoding or "ascii")  # a stream of a program, such as StringIO, has none

    def update(self, done: int, extra: str = "") -> None:
        """Show `done` of the total, the time left, and `extra`."""
        now = time.monotonic() - self._start
        if done < self._total and now - self._last < (0.1 if self._live else 5.0):
            return
        self._last = now
        if done >= self._total:
            left = f", {now:.1f} s"
        else:  # the first second says nothing of the rest
            left = f", {duration(now / done * (self._total - done))} left" if done and now > 1 else ""
        tail = f", {extra}" if extra else ""
        if self._live:
            filled = int(24 * done / max(1, self._total))
            bar = self._blocks[0] * filled + self._blocks[1] * (24 - filled)
            end = "\n" if done >= self._total else ""
            line = f"\r\033[K{self._what} {bar} {done}/{self._total} {self._unit}{left}{tail}"
            print(line, end=end, file=sys.stderr, flush=True)
        else:
            print(f"{self._what}: {done}/{self._total} {self._unit}{left}{tail}", file=sys.stderr, flush=True)
