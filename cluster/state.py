"""What the local stack remembers: one directory with its data, secrets, logs and `state.json`.

state.json   services, process numbers, ports; written before each start
secrets/     made once, 0600: S3 keys, MLflow password, Ray token, certificate of gRPC
s3/ mlflow/  data: buckets, tracking database
ray/ logs/   Ray's session folder; one log a service
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.errors import ConfigError, StackError
from storage.objects.retry import OutOfTime, RetryPolicy, repeat

STATE_VARIABLE = "TOMOSCALE_STATE"
SERVICES = ("s3", "mlflow", "ray")
NODE = "node"
SECRETS = (
    "s3_access_key",
    "s3_secret_key",
    "mlflow_password",
    "mlflow_cookie_key",
    "mlflow_webhook_key",
    "ray_token",
)
"""Made once; all but the first are 64 hexadecimal digits."""
# Ray puts `<temp>/session_YYYY-MM-DD_HH-MM-SS_micros_pid/sockets/plasma_store` in a Unix socket address of 107 bytes.
_LONGEST = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


@dataclasses.dataclass
class Service:
    """One server: its process and its ports by purpose."""

    pid: int | None = None
    created: float | None = None
    ports: dict[str, int] = dataclasses.field(default_factory=dict)
    healthy_s: float | None = None  # seconds from the start to the first good answer


@dataclasses.dataclass
class State:
    """The content of `state.json`."""

    stack: str
    services: dict[str, Service] = dataclasses.field(default_factory=dict)
    ports: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # of the last start, used again if free
    cpus: int = 0
    nodes: int = 1  # of Ray, its head included

    @property
    def names(self) -> tuple[str, ...]:
        """All servers, each after those that it needs: `SERVICES`, then `node-2` and so on."""
        return (*SERVICES, *self.further)

    @property
    def further(self) -> tuple[str, ...]:
        """Ray's nodes beside its head: `node-2` and so on."""
        return tuple(f"{NODE}-{number}" for number in range(2, self.nodes + 1))


def kind(name: str) -> str:
    """What a server is: of `node-2`, `node`."""
    return name.partition("-")[0]


def default_dir() -> Path:
    """`$TOMOSCALE_STATE`, else `~/.tomoscale`."""
    return Path(os.environ.get(STATE_VARIABLE) or "~/.tomoscale").expanduser().absolute()


def prepare(state_dir: Path) -> State:
    """Make the directory and its secrets where they are missing; returns the state, new or found.

    Raises:
        ConfigError: the path is too long for Ray's sockets.
        StackError: it cannot be written, or holds something that is not ours.
    """
    if len(os.fsencode(state_dir)) > _LONGEST:
        raise ConfigError(
            f"state directory {state_dir}",
            expected=f"a path of at most {_LONGEST} bytes, because Ray puts Unix sockets below it",
            found=f"{len(os.fsencode(state_dir))} bytes",
            remedy=f"set {STATE_VARIABLE} to a shorter path",
        )
    try:
        for folder in (state_dir, *(state_dir / name for name in ("secrets", "s3", "mlflow", "ray", "logs"))):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state_dir.chmod(0o700)
        state = load(state_dir)
        if state is None:
            state = State(stack=secrets.token_hex(8))
            write_private(state_dir / "state.json", json.dumps(dataclasses.asdict(state), indent=1), keep=True)
            state = load(state_dir) or state
        for name in SECRETS:
            _make_secret(state_dir, name)
    except OSError as error:
        raise StackError(
            f"state directory {state_dir}",
            expected="a directory that this user can write",
            found=str(error.strerror or error),
            remedy=f"free space or change its owner, or set {STATE_VARIABLE} to another path",
        ) from error
    return state


def load(state_dir: Path) -> State | None:
    """The state, or None where no stack was ever started.

    Raises:
        StackError: the file cannot be read.
    """
    path = state_dir / "state.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        services = {name: Service(**fields) for name, fields in data.pop("services").items()}
        return State(services=services, **data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StackError(
            str(path),
            expected="the state of a local stack",
            found=str(error),
            remedy="if it was edited or cut short, end the servers by hand and remove the file",
        ) from error


def save(state_dir: Path, state: State) -> None:
    """Write the state so that a reader sees the old or the new one, never a part."""
    write_private(state_dir / "state.json", json.dumps(dataclasses.asdict(state), indent=1))


def write_private(path: Path, text: str, *, keep: bool = False) -> None:
    """Replace a file at once, readable by its owner only from its first byte on.

    Args:
        path: The file.
        text: What it holds then.
        keep: Leave one that is there: of two programs that make it together, both then have the first one's.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if keep:
            with contextlib.suppress(FileExistsError):
                os.link(part, path)
            part.unlink()
        else:
            os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def secret(state_dir: Path, name: str) -> str:
    """A secret made by `prepare`.

    Raises:
        StackError: it is missing.
    """
    try:
        return (state_dir / "secrets" / name).read_text(encoding="utf-8")
    except OSError as error:
        raise StackError(
            str(state_dir / "secrets" / name),
            expected="a secret of the local stack",
            found=str(error.strerror),
            remedy="start the stack with `tomoscale up`",
        ) from error


def _make_secret(state_dir: Path, name: str) -> None:
    path = state_dir / "secrets" / name
    if not path.exists():
        write_private(path, secrets.token_hex(10 if name == "s3_access_key" else 32), keep=True)


@contextlib.contextmanager
def locked(state_dir: Path, wait_s: float = 60.0) -> Iterator[None]:
    """Hold the directory for one `up` or `down` at a time; the kernel lets go when the holder dies.

    Raises:
        StackError: somebody else holds it for longer than `wait_s`.
    """
    with (state_dir / "lock").open("w") as file:
        # Looked at again and again, since the kernel's lock has no time-out.
        policy = RetryPolicy(deadline_s=wait_s, attempt_s=0.0, first_s=0.2, cap_s=0.2)
        try:
            repeat(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB), policy, _is_taken)
        except OutOfTime as end:
            raise StackError(
                f"state directory {state_dir}",
                expected="to be alone with it",
                found="another `tomoscale up` or `down` at work",
                remedy="wait until it is done",
            ) from end.last
        yield


def _is_taken(error: Exception) -> bool:
    return isinstance(error, BlockingIOError)
