"""What ends a job waits for MLflow: hours of training must not fail on a server that is away for minutes."""

import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

from jobs.output import last_line
from storage.errors import ConfigError, StackError
from storage.objects.certificates import causes, distrust
from storage.objects.retry import OutOfTime, RetryPolicy, repeat

T = TypeVar("T")
WAIT_VARIABLE = "TOMOSCALE_MLFLOW_WAIT_S"
WAIT_S = 3600.0
_FIRST_PAUSE_S, _MAX_PAUSE_S, _SAY_S = 2.0, 60.0, 300.0  # pauses are random: half of these on average
_BUSY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "RESOURCE_EXHAUSTED", "REQUEST_LIMIT_EXCEEDED")
_STATUS = re.compile(r"failed with error code (429|5\d\d)\b")


def through_outage(attempt: Callable[[], T], what: str) -> T:
    """The result of `attempt`, which is repeated with growing pauses while MLflow is away.

    Args:
        attempt: Asks MLflow for something that may be asked for twice.
        what: What the log says is waiting, such as `the points of a`.

    Raises:
        StackError: MLflow was away for longer than TOMOSCALE_MLFLOW_WAIT_S seconds, 3600 by default.
        ConfigError: that variable is not a number of seconds.
        Exception: anything else that `attempt` raises, at once.
    """
    limit, uri = wait_s(), os.environ.get("MLFLOW_TRACKING_URI", "")
    began, again_at = time.monotonic(), 0.0

    def notice(_error: Exception, spent_s: float) -> None:
        nonlocal again_at
        if spent_s >= again_at:
            again_at = spent_s + _SAY_S
            print(f"MLflow at {uri} is away; waiting for it with {what}, {limit - spent_s:.0f} s at most", flush=True)

    policy = RetryPolicy(deadline_s=limit, attempt_s=0.0, first_s=_FIRST_PAUSE_S, cap_s=_MAX_PAUSE_S)
    try:
        result = repeat(attempt, policy, is_away, notice, sleep=time.sleep)
    except OutOfTime as end:
        raise StackError(
            f"MLflow at {uri}",
            expected=f"an answer within {limit:g} s, to take {what}",
            found=last_line(end.last),
            remedy="nothing trained is lost: send the same configuration again when it is back; "
            f"{WAIT_VARIABLE} sets how long a job waits",
        ) from end.last
    if again_at:
        print(f"MLflow is back after {time.monotonic() - began:.0f} s", flush=True)
    return result


def wait_s() -> float:
    """How long a job waits for MLflow at its end, in seconds.

    Raises:
        ConfigError: the variable is not a number of seconds.
    """
    text = os.environ.get(WAIT_VARIABLE, "")
    try:
        seconds = float(text) if text else WAIT_S
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(WAIT_VARIABLE, expected="a number of seconds, 0 or more", found=text)
    return seconds


def is_away(error: BaseException) -> bool:
    """Whether an error says that the server is away or overloaded, and not that it refused."""
    import requests  # late, with MLflow: not every job has them
    from mlflow.exceptions import RestException
    from requests.exceptions import RetryError  # of answers such as 503, after the client's own repetitions

    if distrust(error):
        return False
    for cause in causes(error):
        if isinstance(cause, ConnectionError | TimeoutError | requests.ConnectionError | requests.Timeout | RetryError):
            return True
        if isinstance(cause, requests.HTTPError) and cause.response is not None:
            return cause.response.status_code == 429 or cause.response.status_code >= 500
        # What the answer says itself: the code of one that says none is by default that of a server which failed.
        if isinstance(cause, RestException) and cause.json.get("error_code") in _BUSY:
            return True
        if _STATUS.search(str(cause)):
            return True
    return False
