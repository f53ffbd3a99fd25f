"""Retries for object stores: capped exponential backoff with full jitter under one deadline.

The libraries below keep their own retries off, since nested retries multiply (platform defaults hang for minutes).
By hand, because libraries of retries bound the start of the last attempt and not its end.
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from storage.errors import ConfigError, StoreError

T = TypeVar("T")
ATTEMPT_S, CONNECT_S = 30.0, 5.0


class TransientError(Exception):
    """Raised by an attempt that may succeed when repeated: 5xx, 429, reset, timeout, truncated body."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often to try.

    Args:
        deadline_s: No operation lasts longer than this, its last attempt included.
        attempt_s: Longest single request; the clients are built with it.
        connect_s: Longest wait for a connection.
        first_s: Upper end of the first wait; it doubles with each attempt. Waits are uniform in [0, upper end].
        cap_s: Largest upper end of a wait.
    """

    deadline_s: float = 120.0
    attempt_s: float = ATTEMPT_S
    connect_s: float = CONNECT_S
    first_s: float = 0.1
    cap_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.attempt_s <= self.deadline_s:
            raise ConfigError(
                "retry policy",
                expected="0 < attempt_s <= deadline_s",
                found=f"attempt_s={self.attempt_s}, deadline_s={self.deadline_s}",
            )

    @classmethod
    def from_environment(cls) -> "RetryPolicy":
        """The defaults, with the deadline taken from TOMOSCALE_STORE_DEADLINE_S where it is set.

        Raises:
            ConfigError: the variable is not a positive number.
        """
        text = os.environ.get("TOMOSCALE_STORE_DEADLINE_S", "")
        if not text:
            return cls()
        try:
            deadline = float(text)
        except ValueError:
            deadline = 0.0
        if not 0 < deadline < float("inf"):
            raise ConfigError("TOMOSCALE_STORE_DEADLINE_S", expected="a positive number of seconds", found=text)
        # A long deadline gives single requests more time as well: 64 MiB at 1 MB/s take a minute.
        attempt = max(min(ATTEMPT_S, deadline / 3), deadline / 4)
        return cls(deadline, attempt_s=attempt, connect_s=min(CONNECT_S, deadline / 4))


def retry(
    attempt: Callable[[], T],
    policy: RetryPolicy,
    thing: str,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    uniform: Callable[[float, float], float] = random.uniform,
) -> T:
    """Call `attempt` until it returns or raises anything but `TransientError`, or the deadline would be passed.

    A new attempt starts only if it can run its full `attempt_s` before the deadline, so the deadline is an upper bound.

    Raises:
        StoreError: the last transient failure, when time is up; names `thing`.
    """
    start = clock()
    tries = 0
    while True:
        tries += 1
        try:
            return attempt()
        except TransientError as error:
            spent = clock() - start
            room = policy.deadline_s - policy.attempt_s - spent
            wait = min(room, uniform(0.0, min(policy.cap_s, policy.first_s * 2.0 ** min(tries - 1, 30))))
            if room <= 0:
                raise StoreError(
                    thing,
                    expected=f"an answer within {policy.deadline_s:g} s",
                    found=f"{tries} failed attempts in {spent:.1f} s, the last: {error}",
                    remedy="check that the object store is up and reachable; the deadline is "
                    "TOMOSCALE_STORE_DEADLINE_S (seconds)",
                ) from error
            sleep(wait)
