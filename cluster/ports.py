"""Ports of the local stack's servers: which are free, which a server gets, and who holds one that it cannot have."""

import contextlib
import random
import socket
from collections.abc import Iterable, Sequence

import psutil

from cluster import services
from cluster.state import State, kind
from storage.errors import StackError

_RANGE = range(20000, 32000)  # below the ephemeral range, so that an outgoing connection cannot take a port first


def choose(state: State, name: str, requested: int) -> dict[str, int]:
    """Ports of a server by purpose: the requested one, those of the last start as far as they are free, then any.

    Raises:
        StackError: the requested one is taken, or too few are free.
    """
    purposes = services.PORTS[kind(name)]
    reserved = {port for service in state.services.values() for port in service.ports.values()}
    last = state.ports.get(name, {})
    ports: dict[str, int] = {}
    if requested:
        if not is_free(requested):
            owner = owner_of(requested)
            raise StackError(
                f"port {requested} for {services.title(name)}",
                expected="a free port",
                found=f"{owner} listening on it" if owner else "it in use",
                remedy="end that program, name another port, or leave the choice to tomoscale",
            )
        ports[purposes[0]] = requested
    for purpose in purposes:
        port = last.get(purpose, 0)
        if purpose not in ports and port and port not in ports.values() and is_free(port, "0.0.0.0"):
            ports[purpose] = port
    rest = [purpose for purpose in purposes if purpose not in ports]
    try:
        ports.update(zip(rest, find_free(len(rest), reserved | set(ports.values())), strict=True))
    except OSError as error:
        raise StackError(
            f"ports for {services.title(name)}",
            expected="free ports",
            found=str(error),
            remedy="end programs that hold them; `tomoscale doctor` looks too",
        ) from error
    return {purpose: ports[purpose] for purpose in purposes}


def require_address(state: State, name: str, ports: dict[str, int], users: Sequence[str]) -> None:
    """Refuse another address for a server that running ones, `users`, know: they would talk to a stranger.

    Raises:
        StackError: the server would listen elsewhere; names who holds the port that it had.
    """
    purpose = services.PORTS[kind(name)][0]
    last = state.ports.get(name, ports)[purpose]
    if users and last != ports[purpose]:
        owner = owner_of(last)
        raise StackError(
            f"port {last} for {services.title(name)}",
            expected=f"the one that {' and '.join(services.title(user) for user in users)} know, which still run",
            found=f"{owner} listening on it" if owner else f"port {ports[purpose]} instead",
            remedy="end that program, or start all with `tomoscale down` and `tomoscale up`",
        )


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def find_free(count: int, avoid: Iterable[int] = ()) -> list[int]:
    """`count` different ports that nothing listens on, chosen at random.

    Raises:
        OSError: there are not that many.
    """
    excluded = set(avoid)
    ports: list[int] = []
    for port in random.SystemRandom().sample(_RANGE, len(_RANGE)):
        if len(ports) == count:
            break
        # Ray's metadata server listens on every interface, so a port must be free there too.
        if port not in excluded and is_free(port) and is_free(port, "0.0.0.0"):
            ports.append(port)
    if len(ports) < count:
        raise OSError(f"no {count} free ports between {_RANGE.start} and {_RANGE.stop}")
    return ports


def owner_of(port: int) -> str:
    """Who listens on a port, as far as this user may see: `name (pid N)`, else an empty string."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""
