"""Retries of all that may be away for a while: capped exponential backoff with full jitter under one deadline.

`repeat` is the loop, `retry` its use for object stores. The libraries below keep their own retries off, since nested
retries multiply (platform defaults hang for minutes). By hand, because libraries of retries bound the start of the last
attempt and not its end.
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from storage.errors import ConfigError, StoreError

T = TypeVar("T")
Clock = Callable[[], float]
Sleep = Callable[[float], None]
Uniform = Callable[[float, float], float]
ATTEMPT_S, CONNECT_S = 30.0, 5.0


class TransientError(Exception):
    """Raised by an attempt that may succeed when repeated: 5xx, 429, reset, timeout, truncated body."""


class OutOfTime(Exception):
    """The end of all attempts: how many there were, the seconds they took, and the last one's error."""

    def __init__(self, tries: int, spent_s: float, last: Exception) -> None:
        super().__init__(f"{tries} failed attempts in {spent_s:.1f} s, the last: {last}")
        self.tries, self.spent_s, self.last = tries, spent_s, last


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often to try.

    Args:
        deadline_s: No operation lasts longer than this, its last attempt included. Infinite where `tries` ends it.
        attempt_s: Longest single request; the clients are built with it. 0: the last one may end after the deadline.
        connect_s: Longest wait for a connection.
        first_s: Upper end of the first wait; it doubles with each attempt. Waits are uniform in [0, upper end].
        cap_s: Largest upper end of a wait.
        tries: Most attempts; None: as many as there is time for.
    """

    deadline_s: float = 120.0
    attempt_s: float = ATTEMPT_S
    connect_s: float = CONNECT_S
    first_s: float = 0.1
    cap_s: float = 5.0
    tries: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.attempt_s <= self.deadline_s:
            raise ConfigError(
                "retry policy",
                expected="0 <= attempt_s <= deadline_s",
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


def repeat(
    attempt: Callable[[], T],
    policy: RetryPolicy,
    is_passing: Callable[[Exception], bool],
    on_wait: Callable[[Exception, float], None] = lambda _error, _spent_s: None,
    *,
    clock: Clock = time.monotonic,
    sleep: Sleep = time.sleep,
    uniform: Uniform = random.uniform,
) -> T:
    """Call `attempt` until it returns, raises an error that does not pass, or the policy's time or tries are up.

    A new attempt starts only if it can run its full `attempt_s` before the deadline, so the deadline is an upper bound.

    Args:
        attempt: May be called more than once.
        policy: How long and how often.
        is_passing: Whether an error may be gone at the next attempt; one that may not is raised as it is.
        on_wait: Called before each wait with the error and the seconds since the first attempt began.

    Raises:
        OutOfTime: time or tries are up.
    """
    start = clock()
    tries = 0
    while True:
        tries += 1
        try:
            return attempt()
        except Exception as error:
            if not is_passing(error):
                raise
            spent = clock() - start
            room = policy.deadline_s - policy.attempt_s - spent
            if room <= 0 or tries == policy.tries:
                raise OutOfTime(tries, spent, error) from error
            on_wait(error, spent)
            sleep(min(room, uniform(0.0, min(policy.cap_s, policy.first_s * 2.0 ** min(tries - 1, 30)))))


def retry(
    attempt: Callable[[], T],
    policy: RetryPolicy,
    thing: str,
    *,
    clock: Clock = time.monotonic,
    sleep: Sleep = time.sleep,
    uniform: Uniform = random.uniform,
) -> T:
    """`repeat` for requests to an object store, whose errors that pass are `TransientError`.

    Raises:
        StoreError: the last transient failure, when time is up; names `thing`.
    """
    try:
        return repeat(attempt, policy, _is_transient, clock=clock, sleep=sleep, uniform=uniform)
    except OutOfTime as end:
        raise StoreError(
            thing,
            expected=f"an answer within {policy.deadline_s:g} s",
            found=str(end),
            remedy="check that the object store is up and reachable; the deadline is "
            "TOMOSCALE_STORE_DEADLINE_S (seconds)",
        ) from end.last


def _is_transient(error: Exception) -> bool:
    return isinstance(error, TransientError)
