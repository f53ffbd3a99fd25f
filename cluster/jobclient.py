"""Ray jobs over HTTP: submit, list, status, logs, stop; on any cluster with a job server, with a token or without."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster import state as states
from cluster.patience import OUTAGE_S, UnknownJob, forgotten, through_outage
from cluster.ray_hooks import patch_ray_to_limit_requests
from storage.errors import StackError
from storage.objects.certificates import REMEDY, distrust

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
# Beside .gitignore and Ray's own .git, .venv, venv and __pycache__.
EXCLUDES = (
    ".venv*",
    "*.egg-info",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    ".tomoscale",
    "demo-out",
)
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_environment_lock = threading.Lock()
_REQUEST_S = (10.0, 120.0)  # to connect, and between two bytes of an answer


@dataclass(frozen=True)
class JobInfo:
    """One submitted job."""

    id: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED
    entrypoint: str
    message: str
    started: float | None  # seconds since 1970
    ended: float | None
    metadata: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def token_for(address: str) -> str:
    """The token to show to a job server: that of a local stack if the address is its own, else Ray's usual places.

    Those are $RAY_AUTH_TOKEN, the file $RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token. The token of a stack goes to the
    address in its state file only, even when those variables name it: no other server must learn it.
    """
    variable = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(variable).expanduser().absolute() if variable else None
    folders = [states.default_dir(), *([path.parent.parent] if path else [])]
    for folder in folders:
        if _is_its_jobs_address(address, folder):
            return states.secret(folder, "ray_token")
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    if path and (path.parent.parent / "state.json").exists():
        path = None
    try:
        return (path or Path("~/.ray/auth_token").expanduser()).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _is_its_jobs_address(address: str, state_dir: Path) -> bool:
    state = states.load(state_dir)
    service = state.services.get("ray") if state else None
    url = urlsplit(address)
    return bool(service and url.hostname in ("127.0.0.1", "localhost") and url.port == service.ports.get("dashboard"))


def cluster_info(address: str, headers: Mapping[str, str] | None = None, **options: Any) -> Any:
    """Answer Ray's question where `cluster://HOST:PORT` is and with which headers; see `cluster.__init__`."""
    from ray.dashboard.modules.dashboard_sdk import ClusterInfo

    url = f"http://{address}"
    sent = dict(headers or {})
    if not any(name.lower() == "authorization" for name in sent):
        sent |= _shown(token_for(url))
    return ClusterInfo(address=url, cookies=options.get("cookies"), metadata=options.get("metadata"), headers=sent)


def submit(
    address: str,
    entrypoint: str,
    *,
    working_dir: Path | None = None,
    submission_id: str | None = None,
    metadata: Mapping[str, str] | None = None,
    env_vars: Mapping[str, str] | None = None,
    token: str | None = None,
) -> str:
    """Submit a job and return its id.

    Args:
        address: `http(s)://HOST:PORT` or `cluster://HOST:PORT` of the job server.
        entrypoint: The command line to run.
        working_dir: A folder to upload and run in; without one the job uses what is installed there.
        submission_id: The id to give it; refused when there is one of that name.
        metadata: Shown by the job API: no secrets.
        env_vars: Shown by the job API: no secrets. The nodes hold credentials.
        token: Bearer token; by default see `token_for`.

    Raises:
        StackError: unreachable, refused, or the name is taken.
    """
    runtime: dict[str, Any] = {}
    if working_dir is not None:
        runtime["working_dir"] = str(working_dir)
        runtime["excludes"] = list(EXCLUDES)
    if env_vars:
        runtime["env_vars"] = dict(env_vars)
    with _client(address, token) as client:
        return client.submit_job(
            entrypoint=entrypoint,
            submission_id=submission_id,
            metadata=dict(metadata or {}),
            runtime_env=runtime,
        )


def list_jobs(address: str, *, token: str | None = None) -> list[JobInfo]:
    """All submitted jobs, oldest first.

    Raises:
        StackError: unreachable or refused.
    """
    with _client(address, token) as client:
        jobs = [_info(details) for details in client.list_jobs() if details.submission_id]
    return sorted(jobs, key=lambda job: job.started or 0.0)


def status(
    address: str,
    job: str,
    *,
    token: str | None = None,
    outage_s: float = 0.0,
    say: Callable[[str], None] = lambda _line: None,
) -> JobInfo:
    """One job.

    Args:
        address: As for `submit`.
        job: Its id.
        token: As for `submit`.
        outage_s: How long the server may be away before this gives up.
        say: Called with a line where it is away.

    Raises:
        UnknownJob: no such job.
        StackError: unreachable or refused.
    """

    def look() -> JobInfo:
        with _client(address, token, job) as client:
            return _info(client.get_job_info(job))

    return through_outage(look, address, job, outage_s, say) if outage_s else look()


def logs(address: str, job: str, *, token: str | None = None) -> str:
    """What the job has written so far.

    Raises:
        StackError: unreachable, refused, or no such job.
    """
    with _client(address, token, job) as client:
        return client.get_job_logs(job)


def tail(address: str, job: str, lines: int, *, token: str | None = None) -> str:
    """The last lines that a job has written; of a long log no more than those comes over the network.

    Raises:
        StackError: unreachable, refused, or no such job.
    """
    with _client(address, token, job) as client:
        question = {"submission_id": job, "lines": str(lines)}
        answer = client._do_request("GET", "/api/v0/logs/file", params=question)
        # That part of the dashboard lacks a job that waits, one whose node is gone, and all where a proxy lets nothing
        # but `/api/jobs` pass.
        text = answer.content.decode("utf-8", "replace") if answer.status_code == 200 else client.get_job_logs(job)
    return "".join(text.splitlines(keepends=True)[-lines:])


def follow(
    address: str,
    job: str,
    *,
    token: str | None = None,
    outage_s: float = OUTAGE_S,
    say: Callable[[str], None] = lambda _line: None,
) -> Iterator[str]:
    """Yield what the job writes until it ends, then return; ask `status` how it ended.

    Polls, because Ray's own stream ends without a word when the connection does.

    Args:
        address: As for `submit`.
        job: Its id.
        token: As for `submit`.
        outage_s: How long the server may be away before this gives up.
        say: Called with a line where it is away and when it is back.

    Raises:
        Unreachable: for longer than `outage_s`. The job goes on.
        UnknownJob: no such job, or one that the cluster has forgotten since.
        StackError: refused.
    """

    def look() -> tuple[bool, str]:
        with _client(address, token, job) as client:
            ended = client.get_job_status(job) in ENDED  # before the logs: nothing is written after the end
            return ended, client.get_job_logs(job)

    printed, pause, is_first = 0, 0.3, True
    while True:
        try:
            ended, text = through_outage(look, address, job, outage_s, say)
        except UnknownJob as error:
            if is_first:
                raise
            raise forgotten(address, job) from error
        is_first = False
        if len(text) > printed:
            yield text[printed:]
            # Each look fetches the whole log, so a long one is looked at less often.
            printed, pause = len(text), max(0.3, len(text) / 2e6)
        if ended:
            return
        time.sleep(pause)
        pause = max(pause, min(2.0, pause * 1.3))


def stop(address: str, job: str, *, wait_s: float = 30.0, token: str | None = None) -> JobInfo:
    """Ask a job to stop and wait for it.

    Raises:
        StackError: unreachable, refused, no such job, or still running after `wait_s`.
    """
    with _client(address, token, job) as client:
        client.stop_job(job)
        deadline = time.monotonic() + wait_s
        while True:
            info = _info(client.get_job_info(job))
            if info.status in ENDED:
                return info
            if time.monotonic() > deadline:
                raise StackError(
                    f"job {job}", expected=f"it to stop within {wait_s:.0f} s", found=info.status, remedy="try again"
                )
            time.sleep(0.3)


def stop_all(address: str, *, wait_s: float = 10.0, token: str | None = None) -> list[str]:
    """Stop every job that has not ended; returns the ids of those that were asked.

    Raises:
        StackError: unreachable or refused.
    """
    with _client(address, token) as client:
        running = [d.submission_id for d in client.list_jobs() if d.submission_id and d.status not in ENDED]
        for job in running:
            client.stop_job(job)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and any(client.get_job_status(job) not in ENDED for job in running):
            time.sleep(0.3)
    return running


@contextlib.contextmanager
def _client(address: str, token: str | None, job: str = "") -> "Iterator[JobSubmissionClient]":
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    url = address.replace("cluster://", "http://", 1).rstrip("/")
    if "@" in urlsplit(url).netloc:
        raise StackError(
            "address of the job server",
            expected="one without a password, which logs would show",
            found="a user or password in it",
            remedy="put a token into RAY_AUTH_TOKEN or the file RAY_AUTH_TOKEN_PATH",
        )
    if urlsplit(url).scheme not in ("http", "https"):
        raise StackError(
            f"address {address!r}",
            expected="http://HOST:PORT of a Ray job server",
            found="another kind of address",
            remedy="`tomoscale status` prints the one of the local stack",
        )
    token = token_for(url) if token is None else token
    patch_ray_to_limit_requests(_REQUEST_S)
    try:
        with _addresses_unset():
            client = JobSubmissionClient(url, headers=_shown(token))
        yield client
    except AuthenticationError as error:
        raise StackError(
            f"Ray jobs at {url}",
            expected="a valid token",
            found="it refused the one it was shown" if token else "that it asks for a token and none was found",
            remedy="set RAY_AUTH_TOKEN_PATH to the cluster's token file; for the local stack, check TOMOSCALE_STATE",
        ) from error
    except (ConnectionError, OSError) as error:
        if wrong := distrust(error):
            raise StackError(
                f"Ray jobs at {url}",
                expected="a certificate that this machine trusts",
                found=wrong,
                remedy=REMEDY,
            ) from error
        raise _absent(url, str(error)) from ConnectionError(str(error))
    except (RuntimeError, ValueError) as error:
        # The server answers with its whole traceback; the last line is the reason.
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
        text = lines[-1] if lines else type(error).__name__
        if job and ("does not exist" in text or "404" in text):
            raise UnknownJob(
                f"job {job}",
                expected="a job of this cluster",
                found="none of that name",
                remedy="`tomoscale jobs list` names those that it has; a head that was started anew has lost its jobs: "
                "the same configuration, sent again, goes on from its last checkpoint",
            ) from error
        raise StackError(
            f"Ray jobs at {url}",
            expected="the request to be accepted",
            found=text[:400],
            remedy="`tomoscale doctor` says whether it answers; the head's dashboard.log has the rest",
        ) from error


def _absent(url: str, reason: str) -> StackError:
    return StackError(
        f"Ray jobs at {url}",
        expected="a job server",
        found=" ".join(reason.split())[:200],
        remedy="check the address and the network; `tomoscale up` starts a local one",
    )


def _shown(token: str) -> dict[str, str]:
    """The header that shows a token; an empty one shows none, and keeps Ray from adding what its variables name.

    That may be the token of the local stack, which no other server must learn.
    """
    return {"Authorization": f"Bearer {token}" if token else ""}


@contextlib.contextmanager
def _addresses_unset() -> Iterator[None]:
    """Ray lets these variables win over the address that a caller names; here the caller wins."""
    with _environment_lock:
        values = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
        try:
            yield
        finally:
            os.environ.update(values)


def _info(details: Any) -> JobInfo:
    return JobInfo(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        entrypoint=details.entrypoint,
        message=details.message or "",
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        metadata=dict(details.metadata or {}),
    )
