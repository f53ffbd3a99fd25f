"""Fuzzing for as long as there is time: a fixed round of examples in `make test`, as many as fit in `make fuzz`."""

import faulthandler
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

MINUTES = float(os.environ.get("TOMOSCALE_FUZZ_MINUTES", "0"))
"""For all targets together; 0 is one round for each."""
MOST_SECONDS = 20.0
"""Processor time of one damaged file of a few kB."""
_MOST_WALL_SECONDS = 15 * MOST_SECONDS
"""On the clock, which a busy machine stretches."""
MOST_MIB = 256
"""Memory that one may take, beyond what the process had before."""

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
_ODD_NUMBERS = [b"0", b"-1", b"1", b"1e400", b"nan", b"inf", b"99999999999", b"2147483648", b"", b"0.5", b"x", b"%s"]
_ODD_BYTES = [
    b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\0\0\xc0\x7f", b"\x7f\xc0\0\0",
    b"\0\0\x80\x7f", b"\xff\xff", b"\0\x80", b"\x01\0\0\0", b"\0\0\0\x01",
]  # fmt: skip
DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 1500), st.integers(0, 255)),
        st.tuples(st.just("bytes"), st.integers(0, 1500), st.integers(0, len(_ODD_BYTES) - 1)),
        st.tuples(st.just("number"), st.integers(0, 60), st.integers(0, len(_ODD_NUMBERS) - 1)),
        st.tuples(st.just("cut"), st.integers(0, 3000), st.just(0)),
    ),
    min_size=1,
    max_size=6,
)
"""What may happen to a file."""


def damaged(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    """The file after them: bytes of its head replaced, numbers of its text replaced, its end cut off."""
    out = bytearray(data)
    for kind, at, value in changes:
        head = min(len(out), 1500)
        if kind == "set" and head:
            out[at % head] = value
        elif kind == "bytes" and head:
            piece = _ODD_BYTES[value]
            out[at % head : at % head + len(piece)] = piece
        elif kind == "number":
            numbers = list(_NUMBER.finditer(out[:1500]))
            if numbers:
                start, end = numbers[at % len(numbers)].span()
                out[start:end] = _ODD_NUMBERS[value]
        elif kind == "cut":
            del out[len(out) - at % (len(out) + 1) :]
    return bytes(out)


def fuzz(target: Callable[[Any], None], strategy: st.SearchStrategy[Any], examples: int, share: float) -> None:
    """Call the target with `examples` drawn values; again with others while its share of the minutes lasts."""
    end = time.monotonic() + 60 * MINUTES * share
    number = 0
    while number == 0 or time.monotonic() < end:
        health = [HealthCheck.too_slow, HealthCheck.data_too_large]
        limits = settings(max_examples=examples, database=None, deadline=None, suppress_health_check=health)

        def one(drawn: Any) -> None:
            target(drawn)

        seed(number)(limits(given(drawn=strategy)(one)))()
        number += 1


@contextmanager
def within_limits() -> Iterator[None]:
    """Fails where what is done inside takes more processor time or memory than stated above.

    A loop in Python ends at the limit. One in a library, which looks at no signal, ends the process with a traceback.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"more than {MOST_SECONDS:g} s")

    before, start = _reset_peak_mib(), time.process_time()
    handler = signal.signal(signal.SIGPROF, late)
    faulthandler.dump_traceback_later(_MOST_WALL_SECONDS, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, handler)
    seconds, mib = time.process_time() - start, _peak_mib() - before
    assert seconds <= MOST_SECONDS, f"{seconds:.1f} s"
    assert mib <= MOST_MIB, f"{mib:.0f} MiB"


def _reset_peak_mib() -> float:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size now
    return _peak_mib()


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
