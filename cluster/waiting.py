"""Finding a job by its name, and waiting for its end."""

import math
import time
from collections.abc import Callable

from cluster import jobclient
from cluster.patience import OUTAGE_S, StillRunning


def newest(address: str, name: str, *, token: str | None = None) -> str:
    """The id of the newest submission of a job's name; the word itself where it is an id, or nothing that is there.

    Raises:
        StackError: unreachable or refused.
    """
    jobs = jobclient.list_jobs(address, token=token)
    ids = [job.id for job in jobs if job.metadata.get("tomoscale.name") == name]
    return name if not ids or any(job.id == name for job in jobs) else ids[-1]


def wait(
    address: str,
    job: str,
    *,
    timeout_s: float | None = None,
    token: str | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> jobclient.JobInfo:
    """The job when it has ended.

    Args:
        address: As for `submit`.
        job: Its id.
        timeout_s: How long to wait; None has no limit.
        token: As for `submit`.
        say: Called with a line where the server is away.

    Raises:
        StillRunning: it has not ended within `timeout_s`.
        UnknownJob: no such job.
        StackError: unreachable or refused.
    """
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    info, pause = jobclient.status(address, job, token=token), 0.3
    while info.status not in jobclient.ENDED:
        left = deadline - time.monotonic()
        if left <= 0:
            raise StillRunning(
                f"job {job}",
                expected=f"its end within {timeout_s:g} s",
                found=info.status,
                remedy="it goes on; wait again, or for longer with --timeout",
            )
        time.sleep(min(pause, left))
        pause = min(5.0, pause * 1.3)
        info = jobclient.status(address, job, token=token, outage_s=OUTAGE_S, say=say)
    return info
