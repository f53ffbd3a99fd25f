"""One job of a name at a time, whoever sent it: a lease beside the checkpoints, renewed while the job works.

Whether a lease is alive is judged by its object alone, as a newcomer sees it: one that changes has an owner. Clocks of
machines are never compared. A newcomer on the machine of an owner that is dead need not wait.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any

import psutil

from cluster import processes
from storage.errors import NotFound, StackError, StoreError
from storage.objects import ByteStore, join, open_store

RENEW_S = 10.0
EXPIRE_S = 60.0
"""A lease that stood still for so long, as seen by a newcomer that could read it all the time, has no owner."""
GRACE_S = 10.0
"""How long an owner that is at work may take to end: the killed job that is sent again meets its last breath."""
_LOOK_S = 2.0


class LeaseLost(StackError):
    """Another job of this name has taken over, so this one must not write any more."""


class Lease:
    """A context manager that keeps all other jobs of one name and kind out.

    When the lease is lost the main thread is interrupted, and the context ends with `LeaseLost`. A store that is away
    loses no lease: renewing is tried until the store is back, and then asks whose the lease is.

    Args:
        runs: URL of all jobs.
        name: Of the job; the object is `<runs>/<name>/lease-KIND.json`.
        kind: Of the job: `pretrain`, `tune` or `finetune`.
        renew_s: Pause between two renewals.
        expire_s: How long a newcomer watches a lease that stands still before it takes over.
        grace_s: How long a newcomer waits for an owner to end before it gives up.
        say: Called with a line for the log.
    """

    def __init__(
        self,
        runs: str,
        name: str,
        kind: str,
        *,
        renew_s: float = RENEW_S,
        expire_s: float = EXPIRE_S,
        grace_s: float = GRACE_S,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.token = uuid.uuid4().hex
        self._name, self._store, self._key = name, open_store(join(runs, name)), _key(kind)
        self._renew_s, self._expire_s, self._grace_s, self._say = renew_s, expire_s, grace_s, say
        self._facts = {"token": self.token, "job": _job_id(), "host": socket.gethostname(), "process": _process()}
        self._facts["since"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self._beat = 0
        self._content = b""
        self._end = threading.Event()
        self._lost = threading.Event()
        self._thread: threading.Thread | None = None
        self._interruptible = False

    def __enter__(self) -> "Lease":
        """Take the lease, and renew it from now on.

        Raises:
            StackError: a job of this name is at work; names it, its host and since when.
            StoreError: the store does not answer.
        """
        self._take()
        self._interruptible = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lease; an interrupt that came of its loss becomes `LeaseLost`."""
        self._end.set()
        if self._lost.is_set():
            if isinstance(error, LeaseLost):
                return
            raise lost(self._name, self._store.url) from error
        if self._thread is not None:
            self._thread.join(timeout=self._renew_s)
        try:
            self._store.swap(self._key, self._bytes(ended=True), self._content)
        except StoreError as failure:
            self._say(f"the lease of {self._name} could not be released ({failure.found}); it expires by itself")

    def check(self) -> None:
        """Raise where the lease is lost, before anything is written.

        Raises:
            LeaseLost: another job of this name has taken over.
        """
        if self._lost.is_set():
            raise lost(self._name, self._store.url)

    def _take(self) -> None:
        before: bytes | None = None
        began = since = looked = time.monotonic()
        while True:
            current = _read(self._store, self._key)
            now = time.monotonic()
            if now - looked > 3 * _LOOK_S + self._renew_s:
                since = now  # the store was away, for its owner perhaps too
            looked = now
            owner = _facts(current)
            alive = _is_alive(owner)
            if current is None or owner.get("ended") or alive is False or now - since > self._expire_s:
                content = self._bytes()
                if self._store.swap(self._key, content, current):
                    self._content = content
                    return
                before, since = None, now  # somebody else was first
                continue
            if alive or (before is not None and current != before):
                if now - began >= self._grace_s:
                    raise _at_work(self._name, owner)
                since = now
            elif before is None:
                since = now
                self._say(
                    f"the lease of {self._name} was not released by {_owner(owner)}; "
                    f"taking over if it stands still for {self._expire_s:.0f} s"
                )
            before = current
            time.sleep(min(_LOOK_S, self._expire_s / 5, max(0.05, self._grace_s / 5)))

    def _renew(self) -> None:
        pause, is_away = self._renew_s, False
        while not self._end.wait(pause):
            pause = self._renew_s
            content = self._bytes()
            try:
                if self._store.swap(self._key, content, self._content):
                    self._content = content
                elif not self._is_own():
                    self._lose()
                    return
                is_away = False
            except StoreError as error:  # after retries with back-off
                if not is_away:  # once an outage
                    self._say(f"the lease of {self._name} could not be renewed ({error.found}); trying on")
                is_away, pause = True, self._renew_s / 5

    def _is_own(self) -> bool:
        """Whether the object is still of this job, such as after a lost answer; one that is gone is made again."""
        current = _read(self._store, self._key)
        if current is None:
            content = self._bytes()
            if not self._store.swap(self._key, content, None):
                return False
            self._content = content
            return True
        if _facts(current).get("token") != self.token:
            return False
        self._content = current
        return True

    def _lose(self) -> None:
        self._lost.set()
        self._say(str(lost(self._name, self._store.url)))
        if self._interruptible and not self._end.is_set():
            # A signal and no flag, since the main thread waits in a library.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _bytes(self, *, ended: bool = False) -> bytes:
        self._beat += 1
        return json.dumps({**self._facts, "beat": self._beat, "ended": ended}).encode()


def require(runs: str, name: str, kind: str, token: str) -> None:
    """Refuse to write where the lease is another job's by now; for processes that work for its owner.

    Raises:
        LeaseLost: it is.
        StoreError: the store does not answer.
    """
    store = open_store(join(runs, name))
    current = _read(store, _key(kind))
    if current is not None and _facts(current).get("token") != token:
        raise lost(name, store.url)


def lost(name: str, url: str) -> LeaseLost:
    """The error of a job whose lease is lost."""
    return LeaseLost(
        f"job {name!r}",
        expected=f"its lease below {url}",
        found="that another job of this name has taken it over",
        remedy="this one has stopped and writes no more; follow the other with `tomoscale jobs list`",
    )


def _at_work(name: str, owner: dict[str, Any]) -> StackError:
    job = str(owner.get("job") or "")
    follow = f"follow it with `tomoscale jobs logs {job} --follow`, stop it first, or" if job else "stop it first, or"
    return StackError(
        f"job {name!r}",
        expected="that no job of this name is at work, which would write the same checkpoints",
        found=_owner(owner),
        remedy=f"{follow} choose another name",
    )


def _owner(owner: dict[str, Any]) -> str:
    job, host, since = (owner.get(key) or "?" for key in ("job", "host", "since"))
    return f"{job} on {host} since {since}"


def _key(kind: str) -> str:
    return f"lease-{kind}.json"


def _read(store: ByteStore, key: str) -> bytes | None:
    try:
        return store.get(key)
    except NotFound:
        return None


def _facts(content: bytes | None) -> dict[str, Any]:
    """What a lease says; nothing where it is no JSON object, which then has to stand still like any other."""
    try:
        facts = json.loads(content or b"{}")
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _job_id() -> str:
    """The submission id of this driver; empty where Ray's job server did not start it."""
    try:
        metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    except (ValueError, AttributeError):
        return ""
    return str(metadata.get("job_submission_id", ""))


def _process() -> list[Any]:
    """Names this process among all of all machines: boot, namespace, number, start. Nothing without Linux's /proc."""
    place = _place()
    return [*place, os.getpid(), processes.started(psutil.Process())] if place else []


def _place() -> list[str]:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return [file.read().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        return []


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether the process of an owner runs; None where that cannot be seen from this machine."""
    process, place = owner.get("process"), _place()
    if not place or not isinstance(process, list) or len(process) != 4 or process[:2] != place:
        return None
    running = processes.same(int(process[2]), float(process[3]))
    return running is not None and processes.alive(running)
