"""Is this machine fit, and do the services answer that this environment points at?

`run` reads the ordinary variables (AWS_*, MLFLOW_*, RAY_*), so it checks an own cluster as well as the local stack.
"""

import importlib.metadata
import multiprocessing
import os
import resource
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from cluster import ports, services
from cluster import state as states
from storage.errors import ConfigError, TomoscaleError
from storage.objects.open import refuse_credentials

_LEAST_FREE_GB = 10.0
_LARGEST_SKEW_S = 60.0  # S3 refuses signatures that are 15 minutes off; certificates and logs suffer long before
_OFF = {"RAY_USAGE_STATS_ENABLED": ("0",), "MLFLOW_DISABLE_TELEMETRY": ("true", "1")}


@dataclass(frozen=True)
class Check:
    """One question and its answer; `remedy` says what to do when it is not well."""

    name: str
    ok: bool
    finding: str
    remedy: str = ""


def run(store: str = "s3://runs", state_dir: Path | None = None) -> list[Check]:
    """All checks, in the order in which a failure explains the later ones.

    Args:
        store: `s3://bucket[/prefix]` to write a small object to, read it back and delete it; where this key may only
            read, to list.
        state_dir: Folder of the local stack; `$TOMOSCALE_STATE` or `~/.tomoscale` by default.

    Raises:
        ConfigError: `store` is no such URL.
    """
    require_s3(store)
    folder = state_dir or states.default_dir()
    checks = [_python(), _packages(), _start_method(), _shared_memory(), _disk(folder), _files(), _ports(), _proxy()]
    checks += [_telemetry(), _secrets(folder)]
    for name, question in (("S3", lambda: _s3(store)), ("MLflow", _mlflow), ("Ray jobs", _ray)):
        checks += _asked(name, question)
    return checks


def require_s3(store: str) -> None:
    """Refuse a store that is no place on S3.

    Raises:
        ConfigError: it is another URL, or one with credentials in it.
    """
    refuse_credentials(store)
    if urlsplit(store).scheme != "s3" or not urlsplit(store).netloc:
        raise ConfigError(
            f"store {store!r}",
            expected="s3://bucket or s3://bucket/prefix",
            found="another URL",
            remedy="stores in folders need no service: `tomoscale data verify` reads one",
        )


def services_of_node(store: str) -> list[Check]:
    """What a node of a cluster needs around it, asked on the node: room, open files, S3 and MLflow.

    Args:
        store: As of `run`.
    """
    checks = [_shared_memory(), _disk(Path(tempfile.gettempdir())), _files()]
    for name, question in (("S3", lambda: _s3(store)), ("MLflow", _mlflow)):
        checks += _asked(name, question)
    return checks


def _asked(name: str, question: Callable[[], list[Check]]) -> list[Check]:
    try:
        return question()
    except TomoscaleError as error:
        return [Check(name, False, error.found or str(error), error.remedy)]


def _python() -> Check:
    version = f"{sys.version.split()[0]} at {sys.executable}"
    return Check("Python", sys.version_info >= (3, 11), version, "use Python 3.11 or newer")


def _packages() -> Check:
    try:
        required = [Requirement(line) for line in importlib.metadata.requires("tomoscale") or []]
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", False, "tomoscale is not installed", "pip install -e . in its folder")
    wrong = []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name}{requirement.specifier} (found {version or 'none'})")
    if wrong:
        remedy = "make the environment again: `make test` does, from requirements.lock"
        return Check("packages", False, "; ".join(wrong), remedy)
    lock = Path(__file__).resolve().parent.parent / "requirements.lock"
    if not lock.exists():
        return Check("packages", True, f"{len(required)} requirements met; no lock file beside this installation")
    locked, differ = 0, []
    for line in lock.read_text(encoding="utf-8").splitlines():
        name, separator, version = line.split(";")[0].split("#")[0].strip().partition("==")
        if separator:
            locked += 1
            installed = _installed(name.split("[")[0])
            if not _same_release(installed, version.strip()):
                differ.append(f"{name} {installed or 'missing'} instead of {version.strip()}")
    finding = f"{locked - len(differ)} of {locked} as in requirements.lock"
    if differ:
        # Allowed: a GPU machine has another torch. Shown, because it is the first thing to ask about a strange result.
        finding += "; " + ", ".join(differ[:5]) + (" ..." if len(differ) > 5 else "")
    return Check("packages", True, finding)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _same_release(installed: str | None, locked: str) -> bool:
    if installed is None:
        return False
    try:
        return Version(installed).public == Version(locked).public
    except InvalidVersion:
        return installed == locked


def _start_method() -> Check:
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    finding = f"{method} by default"
    if method == "fork":
        finding += "; the stream uses threads and never forks; give a DataLoader of your own forkserver"
    safe = "forkserver" in multiprocessing.get_all_start_methods() or method == "spawn"
    return Check("process start", safe, finding, "S3 clients hang in forked workers: use spawn or forkserver")


def _shared_memory() -> Check:
    if not Path("/dev/shm").is_dir():
        return Check("shared memory", True, "no /dev/shm on this system; Ray uses files")
    free = shutil.disk_usage("/dev/shm").free
    least = services.OBJECT_STORE_BYTES
    remedy = "in a container set --shm-size=1g; Ray falls back to slower files in its folder"
    return Check("shared memory", free >= least, f"{free / 1e6:.0f} MB free in /dev/shm", remedy)


def _disk(folder: Path) -> Check:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    remedy = f"free space, or set {states.STATE_VARIABLE} to a path on another disk"
    return Check("disk", free >= _LEAST_FREE_GB, f"{free:.0f} GB free at {folder}", remedy)


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Check("open files", soft >= 1024, f"limit {soft} (hard {hard})", "ulimit -n 8192")


def _ports() -> Check:
    try:
        ports.find_free(len(services.PORTS["ray"]) + len(services.PORTS["s3"]) + 1)
    except OSError as error:
        return Check("ports", False, str(error), "end programs that hold them")
    return Check("ports", True, "enough free ones on loopback")


def _proxy() -> Check:
    proxy = next((os.environ[name] for name in ("HTTP_PROXY", "http_proxy") if os.environ.get(name)), "")
    around = (os.environ.get("NO_PROXY", "") + "," + os.environ.get("no_proxy", "")).split(",")
    if not proxy:
        return Check("proxy", True, "none for http")
    ok = services.HOST in around or "*" in around
    return Check("proxy", ok, "set for http" + ("" if ok else ", loopback too"), f"add {services.HOST} to NO_PROXY")


def _telemetry() -> Check:
    on = [name for name, off in _OFF.items() if os.environ.get(name, "").lower() not in off]
    finding = "off for Ray and MLflow" if not on else "not switched off: " + ", ".join(on)
    return Check("telemetry", not on, finding, "; ".join(f"export {name}={_OFF[name][0]}" for name in on))


def _secrets(state_dir: Path) -> Check:
    folder = state_dir / "secrets"
    if not folder.is_dir():
        return Check("secrets", True, "no local stack here")
    wide = [path.name for path in sorted(folder.iterdir()) if stat.S_IMODE(path.stat().st_mode) & 0o077]
    finding = "readable by their owner only" if not wide else "readable by others: " + ", ".join(wide)
    return Check("secrets", not wide, finding, f"chmod 600 {folder}/*")


def _s3(store: str) -> list[Check]:
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    address = urlsplit(store)
    session = botocore.session.Session()
    try:
        if session.get_credentials() is None:
            return [Check("S3", False, "no credentials in this environment", "run `tomoscale up`, or set AWS_PROFILE")]
        client = session.create_client(
            "s3", config=Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 2})
        )
        key = "/".join(part for part in (address.path.strip("/"), f".doctor-{uuid.uuid4().hex}") if part)
        began = time.perf_counter()
        answer = client.put_object(Bucket=address.netloc, Key=key, Body=b"doctor", IfNoneMatch="*")
        now = time.time()
        read = client.get_object(Bucket=address.netloc, Key=key)["Body"].read()
        try:
            client.put_object(Bucket=address.netloc, Key=key, Body=b"again", IfNoneMatch="*")
            refused = False
        except ClientError as error:
            refused = error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412)
        client.delete_object(Bucket=address.netloc, Key=key)
        took = time.perf_counter() - began
    except (BotoCoreError, ClientError) as error:
        if _is_refused(error) and (reads := _reads(client, store)):
            return [reads]
        return [Check("S3", False, " ".join(str(error).split())[:300], "check endpoint, credentials and bucket")]
    where = f"{client.meta.endpoint_url} {store}"
    checks = [Check("S3", read == b"doctor", f"{where}: put, get, delete in {took * 1000:.0f} ms")]
    finding = "If-None-Match is kept" if refused else "If-None-Match is ignored"
    checks.append(Check("S3 conditional put", refused, finding, "two writers of one name could overwrite each other"))
    if date := answer["ResponseMetadata"]["HTTPHeaders"].get("date"):
        skew = now - parsedate_to_datetime(date).timestamp()
        checks.append(
            Check("clock", abs(skew) <= _LARGEST_SKEW_S, f"{skew:+.0f} s against the S3 server", "set it with NTP")
        )
    return checks


def _is_refused(error: Exception) -> bool:
    answer: dict[str, Any] = getattr(error, "response", {})
    return bool(answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == 403)


def _reads(client: Any, store: str) -> Check | None:
    """What is said of a store that this key may read and not write, as trainers may the volumes; None of others."""
    from botocore.exceptions import BotoCoreError, ClientError

    address = urlsplit(store)
    began = time.perf_counter()
    try:
        client.list_objects_v2(Bucket=address.netloc, Prefix=address.path.strip("/"), MaxKeys=1)
    except (BotoCoreError, ClientError):
        return None
    took = time.perf_counter() - began
    finding = f"{client.meta.endpoint_url} {store}: list in {took * 1000:.0f} ms; this key may read it and not write it"
    return Check("S3", True, finding)


def _mlflow() -> list[Check]:
    url = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not url.startswith(("http://", "https://")):
        return [Check("MLflow", False, f"MLFLOW_TRACKING_URI is {url or 'not set'}", "run `tomoscale up`, or set it")]
    if "@" in urlsplit(url).netloc:
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return [Check("MLflow", False, "a user or password in MLFLOW_TRACKING_URI, which logs would show", remedy)]
    question = f"{url.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    user = (os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN", "")  # which MLflow takes where there is no user and password
    began = time.perf_counter()
    problem = services.http_problem(question, basic=user if user[0] else None, bearer="" if user[0] else token)
    took = time.perf_counter() - began
    checks = [
        Check(
            "MLflow",
            not problem,
            problem or f"{url} answers in {took * 1000:.0f} ms",
            "check address, user, password or token",
        )
    ]
    if not problem:
        remedy = "start it with --app-name basic-auth, or keep it private"
        checks.append(_closed("MLflow access", question, "asks for a password", "answers without a password", remedy))
    return checks


def _ray() -> list[Check]:
    from cluster import jobclient

    url = os.environ.get("TOMOSCALE_JOBS_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not url:
        remedy = "run `tomoscale up`, or set it to the address of a job server"
        return [Check("Ray jobs", False, "TOMOSCALE_JOBS_ADDRESS is not set", remedy)]
    count = len(jobclient.list_jobs(url))
    question = url.replace("cluster://", "http://", 1).rstrip("/") + "/api/jobs/"
    remedy = "start every node with RAY_AUTH_MODE=token and one token"
    return [
        Check("Ray jobs", True, f"{url} answers, {count} jobs"),
        _closed("Ray access", question, "asks for a token", "runs anybody's code", remedy),
    ]


def _closed(name: str, question: str, closed: str, open_: str, remedy: str) -> Check:
    """Whether a server refuses who shows nothing; one that did not answer has not refused."""
    problem = services.http_problem(question)
    if problem.startswith(("HTTP 401", "HTTP 403")):
        return Check(name, True, closed)
    return Check(name, False, f"not known: {problem}" if problem else open_, "ask again" if problem else remedy)
