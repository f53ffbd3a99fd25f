"""Submitting a job from a client and seeing it through.

The configuration is resolved and checked here, before anything is sent, and travels alone as the job's working
directory; credentials stay on the nodes. A driver that was killed is submitted again under the same name, and the
job goes on from its last checkpoint; a job that failed by itself is not.
"""

import getpass
import importlib
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cluster import jobclient, patience
from jobs.watch.causes import cause_in
from ssl_core.config import Config, dump_yaml
from storage.errors import ConfigError, RefusedInput, StackError, TomoscaleError

_RESUBMISSIONS = 3  # counted, without `storage.objects.retry`: a driver may be killed after days
_PREFIX = re.compile(r"\x1b\[\d+m\((?:RayTrainWorker|one|trial)[^)]*\)\x1b\[0m ?")
# Ray's own chatter about a healthy job; `tomoscale jobs logs` shows it all.
_NOISE = re.compile(
    r"RayDeprecationWarning|self\.exclude_resources|PreemptionWatcher|Runtime env is setting up"
    r"|Running entrypoint for job|FutureWarning|repeated \d+x across cluster|Reporting training result"
)


def submit(address: str, module: str, config: Config, name: str) -> str:
    """Send `python -m MODULE config.yaml` with its configuration; returns the submission id.

    Raises:
        StackError: unreachable, refused, or a job of that name is at work: two would write one another's checkpoints.
    """
    if "runs" in type(config).model_fields:
        _refuse_a_second(address, module, name)
    for chatty in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        importlib.import_module(f"ray.{chatty}")  # they set their own level when they are imported
        logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tomoscale-job-") as folder:
        (Path(folder) / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        submission = f"{name}-{time.strftime('%H%M%S')}-{time.time_ns() % 10000:04d}"
        return jobclient.submit(
            address,
            f"python -m {module} config.yaml",
            working_dir=Path(folder),
            submission_id=submission,
            metadata={"tomoscale.name": name, "tomoscale.module": module, "tomoscale.owner": _owner()},
        )


def _refuse_a_second(address: str, module: str, name: str) -> None:
    marks = {"tomoscale.name": name, "tomoscale.module": module}
    for job in jobclient.list_jobs(address):
        if job.status not in jobclient.ENDED and marks.items() <= job.metadata.items():
            raise StackError(
                f"job {name!r}",
                expected="that it is not at work",
                found=f"{job.id} {job.status}",
                remedy=f"follow it with `tomoscale jobs logs {job.id} --follow`, stop it with `tomoscale jobs stop"
                f" {job.id}`, or choose another name",
            )


def run(address: str, module: str, config: Config, name: str, *, show: Callable[[str], None] = print) -> None:
    """Submit, follow the log, and submit again when the driver was killed.

    Raises:
        TomoscaleError: the job failed; names it and its last line, and has its exit code.
    """
    for attempt in range(_RESUBMISSIONS + 1):
        submission = submit(address, module, config, name)
        show(f"job {submission} submitted to {address}")
        try:
            for text in jobclient.follow(address, submission, say=show):
                for line in text.splitlines():
                    if not _NOISE.search(line):
                        show(_PREFIX.sub("", line))
            job = jobclient.status(address, submission, outage_s=patience.OUTAGE_S, say=show)
        except KeyboardInterrupt:
            show(f"detached; the job goes on. Follow it: tomoscale jobs logs {submission} --follow")
            show(f"Stop it: tomoscale jobs stop {submission}")
            raise
        except patience.UnknownJob as error:
            raise patience.forgotten(address, submission) from error  # it was taken, so the name is right
        if job.status == "SUCCEEDED":
            return
        if not (job.status == "FAILED" and _was_killed(job.message)) or attempt == _RESUBMISSIONS:
            raise failure(submission, job.status, job.message)
        show(f"the driver of {submission} was killed; submitting again to go on from the last checkpoint")


def failure(submission: str, status: str, message: str) -> TomoscaleError:
    """The error of a job that failed by itself: of the kind that its driver's exit code names, with its last line."""
    code = _exit_code(message)
    kind = {ConfigError.exit_code: ConfigError, RefusedInput.exit_code: RefusedInput}.get(code or 0, StackError)
    last = cause(message)
    return kind(
        f"job {submission}",
        expected="success",
        found=f"{status}" + ("" if code is None else f" with exit code {code}") + (f": {last}" if last else ""),
        remedy=f"the log is above, and again with: tomoscale jobs logs {submission}",
    )


def cause(message: str) -> str:
    """Why a job failed, in one sentence, from Ray's message, which has the end of its log; empty where it says nothing.

    That is the last line, since an error of ours is one line. Below a traceback it is the cause in the text, if one is
    known.
    """
    lines = [_PREFIX.sub("", line).strip() for line in message.splitlines()]
    last = next((line for line in reversed(lines) if line and not _NOISE.search(line)), "")[-400:]
    if "; expected " in last:
        return last
    _, _, traceback = "\n".join(lines).rpartition("Traceback (most recent call last)")
    return cause_in(traceback) or cause_in("\n".join(lines[-30:])) or last


def _owner() -> str:
    """Who submits, as `user@host`; the job API shows it to whoever may read jobs."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user number without a name, as in containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _exit_code(message: str) -> int | None:
    """The driver's exit code from Ray's message, negative for a signal; None where it never ran or was lost."""
    code = re.match(r"Job entrypoint command failed with exit code (-?\d+)", message)
    return int(code[1]) if code else None


def _was_killed(message: str) -> bool:
    """Whether a signal ended the driver, or Ray lost it, rather than an error of its own (exit codes 1, 2, 3).

    A job that could not be scheduled or whose environment could not be made would fail again, so it does not count.
    """
    code = _exit_code(message)
    if code is None:
        return message.startswith(("Job supervisor actor died", "Unexpected error occurred"))
    return not 0 <= code < 128
