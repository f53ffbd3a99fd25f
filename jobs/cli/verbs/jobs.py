"""jobs list | status | logs | stop."""

import argparse
import sys
import time

from cluster import jobclient, patience
from jobs.cli.verbs.common import add_json, add_state, job_address, use_stack
from jobs.output import emit, table


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    jobs = verbs.add_parser("jobs", help="jobs of the cluster: list, status, logs, stop")
    actions = jobs.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help_text, run in (
        ("list", "all jobs", _list),
        ("status", "one job", _status),
        ("logs", "a job's log", _logs),
        ("stop", "stop a job; it can be submitted again to go on", _stop),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("--address", metavar="URL", help="job server; the local stack's when empty")
        add_state(action)
        if name != "list":
            action.add_argument("id", help="submission id")
        if name in ("list", "status"):
            add_json(action)
        if name == "logs":
            action.add_argument("--follow", action="store_true", help="stay until the job ends")
        action.set_defaults(run=run)


def _list(arguments: argparse.Namespace) -> int:
    use_stack(arguments)
    jobs = jobclient.list_jobs(job_address(arguments))
    rows = [(j.id, j.status, _clock(j.started), _seconds(j), j.entrypoint) for j in jobs]
    text = table(("id", "status", "started", "seconds", "entrypoint"), rows)
    emit([j.to_json() for j in jobs], arguments.json, text)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    use_stack(arguments)
    job = jobclient.status(job_address(arguments), arguments.id)
    fields = job.to_json() | {"started": _clock(job.started), "ended": _clock(job.ended)}
    emit(job.to_json(), arguments.json, "\n".join(f"{k}: {v}" for k, v in fields.items()))
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    use_stack(arguments)
    address = job_address(arguments)
    if arguments.follow:
        jobclient.status(address, arguments.id)  # a wrong address is no outage
        for text in jobclient.follow(address, arguments.id, say=_say):
            print(text, end="", flush=True)
        job = jobclient.status(address, arguments.id, outage_s=patience.OUTAGE_S, say=_say)
        return 0 if job.status == "SUCCEEDED" else 1
    print(jobclient.logs(address, arguments.id), end="")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stop(arguments: argparse.Namespace) -> int:
    use_stack(arguments)
    status = jobclient.stop(job_address(arguments), arguments.id).status
    print(f"stopped {arguments.id}" if status == "STOPPED" else f"{arguments.id} has ended before: {status}")
    return 0


def _clock(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "-"


def _seconds(job: jobclient.JobInfo) -> int | None:
    return None if job.started is None else round((job.ended or time.time()) - job.started)
