"""jobs list | status | logs | wait | stop."""

import argparse
import re
import sys
import time
from typing import Any

from cluster import jobclient, patience, waiting
from jobs import submit
from jobs.cli.verbs.common import add_json, add_state, job_address, use_stack
from jobs.output import emit, table
from jobs.watch.progress import Progress, progress_in
from storage.errors import ConfigError, StackError

_LOOKED_AT = 200  # lines from the end of a log in which a progress is looked for


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    jobs = verbs.add_parser("jobs", help="jobs of the cluster: list, status, logs, wait, stop")
    actions = jobs.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help_text, run in (
        ("list", "all jobs: kind, name, owner, status and progress", _list),
        ("status", "one job, and why it failed", _status),
        ("logs", "a job's log", _logs),
        ("wait", "wait for a job to end; exits as the job did, and with 4 where it goes on", _wait),
        ("stop", "stop a job; it can be submitted again to go on", _stop),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("--address", metavar="URL", help="job server; the local stack's when empty")
        add_state(action)
        add_json(action)
        if name != "list":
            action.add_argument("id", help="submission id, or the name of a job for its newest submission")
        if name == "logs":
            action.add_argument("--follow", action="store_true", help="stay until the job ends")
            action.add_argument("--tail", type=_lines, metavar="N", help="the last N lines only")
        if name == "wait":
            action.add_argument("--timeout", type=_seconds_of, metavar="SECONDS", help="wait no longer than this")
        action.set_defaults(run=run)


def _lines(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines, 1 or more")
    return int(text)


def _seconds_of(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, 0 or more")
    return seconds


def _list(arguments: argparse.Namespace) -> int:
    use_stack(arguments)
    address = job_address(arguments)
    facts = [_facts(address, job) for job in jobclient.list_jobs(address)]
    columns = ("id", "kind", "name", "owner", "status", "progress", "started", "seconds")
    rows = [(*(fact[c] for c in columns[:5]), _words(fact), _clock(fact["started"]), fact["seconds"]) for fact in facts]
    emit(facts, arguments.json, table(columns, rows))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    address, job = _job(arguments)
    _show(_facts(address, jobclient.status(address, job)), arguments.json)
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    if arguments.follow and (arguments.tail or arguments.json):
        other = "--tail" if arguments.tail else "--json"
        raise ConfigError(other, expected="no --follow beside it", found="--follow", remedy=f"leave {other} out")
    address, job = _job(arguments)
    if arguments.follow:
        jobclient.status(address, job)  # a wrong address is no outage
        for text in jobclient.follow(address, job, say=_say):
            print(text, end="", flush=True)
        info = jobclient.status(address, job, outage_s=patience.OUTAGE_S, say=_say)
        return 0 if info.status == "SUCCEEDED" else 1
    text = jobclient.tail(address, job, arguments.tail) if arguments.tail else jobclient.logs(address, job)
    if arguments.json:
        emit({"id": job, "lines": text.splitlines()}, True, "")
    else:
        print(text, end="")
    return 0


def _wait(arguments: argparse.Namespace) -> int:
    address, job = _job(arguments)
    info = waiting.wait(address, job, timeout_s=arguments.timeout, say=_say)
    if arguments.json:
        _show(_facts(address, info), True)
    if info.status != "SUCCEEDED":
        raise submit.failure(job, info.status, info.message)
    if not arguments.json:
        print(f"{job} {info.status} after {_seconds(info)} s")
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    address, job = _job(arguments)
    info = jobclient.stop(address, job)
    ended = f"stopped {job}" if info.status == "STOPPED" else f"{job} has ended before: {info.status}"
    emit(info.to_json(), arguments.json, ended)
    return 0


def _job(arguments: argparse.Namespace) -> tuple[str, str]:
    use_stack(arguments)
    address = job_address(arguments)
    return address, waiting.newest(address, arguments.id)


def _facts(address: str, job: jobclient.JobInfo) -> dict[str, Any]:
    """What the job API has of a job, and what is read from it: kind, name, owner, progress and cause of failure."""
    module = job.metadata.get("tomoscale.module") or next(iter(re.findall(r"-m (jobs\.\w+)", job.entrypoint)), "")
    progress = _progress(address, job)
    return job.to_json() | {
        "kind": module.removeprefix("jobs.") or None,
        "name": job.metadata.get("tomoscale.name"),
        "owner": job.metadata.get("tomoscale.owner"),
        "seconds": _seconds(job),
        "progress": progress.to_json() if progress else None,
        "cause": submit.cause(job.message) or None if job.status == "FAILED" else None,
    }


def _progress(address: str, job: jobclient.JobInfo) -> Progress | None:
    """Read from the end of a job's log; of a failed one that is in Ray's message. How far another got is no news."""
    if job.status != "RUNNING":
        return progress_in(job.message) if job.status == "FAILED" else None
    try:
        return progress_in(jobclient.tail(address, job.id, _LOOKED_AT))
    except StackError:  # the log went with its node, and the job's other facts are still worth showing
        return None


def _show(facts: dict[str, Any], as_json: bool) -> None:
    fields = facts | {
        "started": _clock(facts["started"]),
        "ended": _clock(facts["ended"]),
        "progress": _words(facts),
        "message": facts["message"].partition("\n")[0],
    }
    emit(facts, as_json, "\n".join(f"{k}: {'-' if v is None else v}" for k, v in fields.items()))


def _words(facts: dict[str, Any]) -> str | None:
    progress = facts["progress"]
    if not progress:
        return None
    left = progress["left"] or "" if facts["status"] == "RUNNING" else ""
    return str(Progress(progress["done"], progress["total"], left))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _clock(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "-"


def _seconds(job: jobclient.JobInfo) -> int | None:
    return None if job.started is None else round((job.ended or time.time()) - job.started)
