"""Watching a job through a network that comes and goes, and telling a job that is lost from one that never was."""

import re
import time
from collections.abc import Callable
from typing import TypeVar

from storage.errors import StackError
from storage.objects.certificates import distrust
from storage.objects.retry import OutOfTime, RetryPolicy, repeat

OUTAGE_S = 3600.0
_NOTICE_S = 10.0  # an outage that is shorter is not worth a line
_GATEWAY = re.compile(r"status code (502|503|504)\b")
T = TypeVar("T")


class Unreachable(StackError):
    """The job server was away for too long to go on watching a job, which goes on."""

    exit_code = 4


class StillRunning(StackError):
    """A job had not ended in the time that somebody was ready to wait for it; it goes on."""

    exit_code = 4


class UnknownJob(StackError):
    """The cluster has no job of that id."""


def forgotten(address: str, job: str) -> UnknownJob:
    """The error of a job that was submitted at this address and is not there any more."""
    return UnknownJob(
        f"job {job}",
        expected=f"the cluster at {address} to have it still",
        found="a cluster without it: its head was started anew and lost its jobs, or the address leads to another one",
        remedy="send the same configuration again; the same name goes on from its last checkpoint",
    )


def through_outage(look: Callable[[], T], address: str, job: str, outage_s: float, say: Callable[[str], None]) -> T:
    """What `look` returns, asked again while the job server is away, for `outage_s` seconds.

    Raises:
        Unreachable: it was away for longer.
        StackError: it refused.
    """
    began, clock, is_noticed = time.monotonic(), time.strftime("%H:%M:%S"), False

    def notice(error: Exception, spent_s: float) -> None:
        nonlocal is_noticed
        if spent_s >= _NOTICE_S and not is_noticed:
            is_noticed = True
            say(f"{address} is not reachable since {clock} ({_reason(error)}); the job goes on, and this keeps trying")

    policy = RetryPolicy(deadline_s=outage_s, attempt_s=0.0, first_s=1.0)
    try:
        result = repeat(look, policy, _is_away, notice, sleep=time.sleep)
    except OutOfTime as end:
        raise Unreachable(
            f"Ray jobs at {address}",
            expected="a job server",
            found=f"that it was not reachable since {clock}, for {end.spent_s:.0f} s: {_reason(end.last)}",
            remedy=f"the job goes on as far as this machine can tell; tomoscale jobs logs {job} --follow",
        ) from end.last
    if is_noticed:
        say(f"{address} is reachable again, after {time.monotonic() - began:.0f} s")
    return result


def _is_away(error: Exception) -> bool:
    cause = error.__cause__
    if not isinstance(error, StackError) or distrust(error):
        return False
    return isinstance(cause, ConnectionError) or bool(_GATEWAY.search(str(cause)))


def _reason(error: Exception) -> str:
    return error.found if isinstance(error, StackError) else str(error)
