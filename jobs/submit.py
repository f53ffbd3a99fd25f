"""Submitting a job from a client and seeing it through.

The configuration is resolved and checked here, before anything is sent, and travels alone as the job's working
directory; credentials stay on the nodes. A driver that was killed is submitted again under the same name, and the
job goes on from its last checkpoint; a job that failed by itself is not.
"""

import logging
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cluster import jobclient
from ssl_core.config import Config, dump_yaml
from storage.errors import StackError

_RESUBMISSIONS = 3
_PREFIX = re.compile(r"\x1b\[\d+m\((?:RayTrainWorker|one|trial)[^)]*\)\x1b\[0m ?")
# Ray's own chatter about a healthy job; `tomoscale jobs logs` shows it all.
_NOISE = re.compile(
    r"RayDeprecationWarning|self\.exclude_resources|PreemptionWatcher|Runtime env is setting up"
    r"|Running entrypoint for job|FutureWarning|repeated \d+x across cluster"
)


def submit(address: str, module: str, config: Config, name: str) -> str:
    """Send `python -m MODULE config.yaml` with its configuration; returns the submission id."""
    logging.getLogger("ray").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tomoscale-job-") as folder:
        (Path(folder) / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        submission = f"{name}-{time.strftime('%H%M%S')}-{time.time_ns() % 10000:04d}"
        return jobclient.submit(
            address,
            f"python -m {module} config.yaml",
            working_dir=Path(folder),
            submission_id=submission,
            metadata={"tomoscale.name": name, "tomoscale.module": module},
        )


def run(address: str, module: str, config: Config, name: str, *, show: Callable[[str], None] = print) -> None:
    """Submit, follow the log, and submit again when the driver was killed.

    Raises:
        StackError: the job failed; names it and its last message.
    """
    for attempt in range(_RESUBMISSIONS + 1):
        submission = submit(address, module, config, name)
        show(f"job {submission} submitted to {address}")
        try:
            for text in jobclient.follow(address, submission):
                for line in text.splitlines():
                    if not _NOISE.search(line):
                        show(_PREFIX.sub("", line))
        except KeyboardInterrupt:
            show(f"detached; the job goes on. Follow it: tomoscale jobs logs {submission} --follow")
            show(f"Stop it: tomoscale jobs stop {submission}")
            raise
        job = jobclient.status(address, submission)
        if job.status == "SUCCEEDED":
            return
        if not (job.status == "FAILED" and _was_killed(job.message)) or attempt == _RESUBMISSIONS:
            raise StackError(
                f"job {submission}",
                expected="success",
                found=f"{job.status}: {' '.join(job.message.split())[-300:]}",
                remedy=f"the log is above, and again with: tomoscale jobs logs {submission}",
            )
        show(f"the driver of {submission} was killed; submitting again to go on from the last checkpoint")


def _was_killed(message: str) -> bool:
    """Whether a signal ended the driver, or Ray lost it, rather than an error of its own (exit codes 1, 2, 3)."""
    code = re.search(r"exit code (-?\d+)", message)
    return code is None or not 0 <= int(code[1]) < 128
