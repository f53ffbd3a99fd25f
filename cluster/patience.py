"""Watching a job through a network that comes and goes, and telling a job that is lost from one that never was."""

import re
import time
from collections.abc import Callable
from typing import TypeVar

from storage.errors import StackError

OUTAGE_S = 3600.0
_NOTICE_S = 10.0  # an outage that is shorter is not worth a line
_GATEWAY = re.compile(r"status code (502|503|504)\b")
T = TypeVar("T")


class Unreachable(StackError):
    """The job server was away for too long to go on watching a job, which goes on."""

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
    """What `look` returns, asked again while the job server is away, for `outage_s` seconds."""
    began, clock, pause, is_noticed = time.monotonic(), time.strftime("%H:%M:%S"), 0.5, False
    while True:
        try:
            result = look()
        except StackError as error:
            if not (isinstance(error.__cause__, ConnectionError) or _GATEWAY.search(str(error.__cause__))):
                raise
            spent = time.monotonic() - began
            if spent >= outage_s:
                raise Unreachable(
                    f"Ray jobs at {address}",
                    expected="a job server",
                    found=f"that it was not reachable since {clock}, for {spent:.0f} s: {error.found}",
                    remedy=f"the job goes on as far as this machine can tell; tomoscale jobs logs {job} --follow",
                ) from error
            if spent >= _NOTICE_S and not is_noticed:
                say(f"{address} is not reachable since {clock} ({error.found}); the job goes on, and this keeps trying")
                is_noticed = True
            time.sleep(min(pause, outage_s))
            pause = min(5.0, 2 * pause)
            continue
        if is_noticed:
            say(f"{address} is reachable again, after {time.monotonic() - began:.0f} s")
        return result
