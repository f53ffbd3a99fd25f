"""The local stack: S3, MLflow and Ray on loopback, started together, looked at, and stopped exactly as started."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from cluster import ports, processes, services
from cluster import state as states
from cluster.stack_info import ServiceInfo, StackInfo, absent, family_mb
from cluster.state import State, default_dir
from storage.errors import StackError

Progress = Callable[[str], None]
START_TIMEOUT_S = 240.0  # 8 s on an idle machine; a server that dies is noticed at once
_LEAST_FREE_BYTES = 2 * 1024**3
_GRACE_S = {"node": 5.0, "ray": 5.0, "mlflow": 4.0, "s3": 2.0}  # jobs were asked before; weed never ends by itself
_TOLD = {"s3": ("mlflow", "ray"), "mlflow": ("ray",), "ray": (), "node": ()}  # who is given the address of a server


def up(
    state_dir: Path | None = None,
    *,
    s3_port: int = 0,
    mlflow_port: int = 0,
    dashboard_port: int = 0,
    cpus: int | None = None,
    nodes: int | None = None,
    progress: Progress = lambda line: None,
) -> StackInfo:
    """Start what does not run and wait until all of it answers.

    Args:
        state_dir: Where data, secrets and logs live; `$TOMOSCALE_STATE` or `~/.tomoscale` by default.
        s3_port: Port of the S3 server; 0 takes the last one, or any that is free.
        mlflow_port: Port of MLflow; 0 likewise.
        dashboard_port: Port of Ray's dashboard and job server; 0 likewise.
        cpus: Logical CPUs that Ray hands out; they are slots, not cores. At least 4 by default, so that a driver, two
            training workers and a trial fit on a machine with two cores.
        nodes: Ray nodes on this machine, the head among them, each with `cpus` of its own: a cluster to try on what
            happens between nodes. What the last start had by default, at first 1.
        progress: Receives one line of text at a time.

    Raises:
        StackError: a port is taken, a program is missing, the disk is full, or a server dies or does not answer in
            time. Everything that this call started is stopped again.
    """
    progress = _unbroken(progress)
    state_dir = (state_dir or default_dir()).expanduser().absolute()
    state = states.prepare(state_dir)
    with states.locked(state_dir):
        state = states.load(state_dir) or state
        _resize(state_dir, state, nodes or state.nodes, progress)
        missing = [name for name in states.SERVICES if not _main(state, name)]
        further = [name for name in state.further if "ray" in missing or not _main(state, name)]
        free = shutil.disk_usage(state_dir).free
        if (missing or further) and free < _LEAST_FREE_BYTES:
            raise StackError(
                f"disk of {state_dir}",
                expected=f"{_LEAST_FREE_BYTES / 1e9:.1f} GB free",
                found=f"{free / 1e9:.1f} GB",
                remedy=f"free space, or set {states.STATE_VARIABLE} to a path on another disk",
            )
        requested = {"s3": s3_port, "mlflow": mlflow_port, "ray": dashboard_port}
        try:
            for name in further:  # one that runs knows a head that is gone
                _end_service(state, name, _GRACE_S[states.NODE])
            _start(state_dir, state, states.SERVICES, missing, requested, cpus, progress)
            if state.nodes > 1:  # once there is a head that they can join
                _start(state_dir, state, state.further, further, requested, cpus, progress)
        except BaseException:  # Ctrl-C included: nothing half-started stays
            progress("stopping what was started")
            _stop(state_dir, state, missing + further, lambda line: None)
            raise
        return _info(state_dir, state)


def _unbroken(progress: Progress) -> Progress:
    """As before, also when nobody reads any more: Ctrl-C ends `| tee` first, and servers must not be left for that."""

    def tell(line: str) -> None:
        with contextlib.suppress(OSError):
            progress(line)

    return tell


def _resize(state_dir: Path, state: State, nodes: int, progress: Progress) -> None:
    """Stop Ray's nodes beyond that number, and note it."""
    if nodes < state.nodes:
        _stop(state_dir, state, state.further[nodes - 1 :], progress)
    state.nodes = nodes
    states.save(state_dir, state)


def _start(
    state_dir: Path,
    state: State,
    names: Sequence[str],
    missing: list[str],
    requested: dict[str, int],
    cpus: int | None,
    progress: Progress,
) -> None:
    """Start those of `names` that are missing, and wait until all of them answer."""
    began = time.monotonic()
    running = [name for name in names if name not in missing]
    if running:
        progress(f"already running: {', '.join(services.title(name) for name in running)}")
    if missing:
        progress(f"starting {', '.join(services.title(name) for name in missing)} in {state_dir}")
    waiting = _launch(state_dir, state, names, missing, requested, cpus)
    why: dict[str, str] = {}
    while waiting:
        for name, server in list(waiting.items()):
            service = state.services[name]
            if _main(state, name) is None:
                if name not in missing:  # it was dying when `up` looked, as after a kill a moment ago
                    progress(f"{services.title(name)} has ended meanwhile; starting it")
                    missing.append(name)
                elif services.IMPATIENT in _tail(server.log):
                    progress(f"this machine is busy, and {services.title(name)} gave up on itself; starting it again")
                else:
                    raise _died(server)
                waiting[name] = _launch(state_dir, state, names, [name], requested, cpus)[name]
                continue
            why[name] = server.probe()
            if why[name]:
                continue
            del waiting[name]
            if service.healthy_s is None:
                service.healthy_s = round(time.monotonic() - began, 1)
                states.save(state_dir, state)
                progress(f"{services.title(name)} answers after {service.healthy_s} s")
        if waiting and time.monotonic() - began > START_TIMEOUT_S:
            name, server = next(iter(waiting.items()))
            raise StackError(
                services.title(name),
                expected=f"a good answer within {START_TIMEOUT_S:.0f} s",
                found=why[name],
                remedy=f"read {server.log}:\n{_tail(server.log)}",
            )
        time.sleep(0.2 if waiting else 0)


def _launch(
    state_dir: Path,
    state: State,
    names: Sequence[str],
    missing: Sequence[str],
    requested: dict[str, int],
    cpus: int | None,
) -> dict[str, services.Server]:
    """Start the missing servers, noting each before and after; returns all of `names`, running ones included."""
    if missing:
        services.write_credentials(state_dir)
    if "ray" in missing:
        state.cpus = cpus or max(4, os.cpu_count() or 1)
        _drop_old_sessions(state_dir)
    for name in missing:
        # Children of a server that died alone would keep its ports.
        _end_service(state, name, 5.0)
        own = ports.choose(state, name, requested.get(name, 0))
        told = _TOLD[states.kind(name)]
        ports.require_address(state, name, own, [other for other in told if _main(state, other)])
        state.services[name] = states.Service(ports=own)
        state.ports[name] = own
    by_service = {name: service.ports for name, service in state.services.items()}
    servers = {name: services.server(name, state_dir, state.stack, by_service, state.cpus) for name in names}
    for name in missing:
        states.save(state_dir, state)
        server, service = servers[name], state.services[name]
        server.log.unlink(missing_ok=True)
        process = processes.spawn(server.command, server.environment, server.log, server.cwd)
        service.pid, service.created = process.pid, processes.started(process)
        states.save(state_dir, state)
    return servers


def _died(server: services.Server) -> StackError:
    return StackError(
        services.title(server.name),
        expected="it to run",
        found="that it ended while it started",
        remedy=f"the last lines of {server.log}:\n{_tail(server.log)}",
    )


def _tail(log: Path, lines: int = 15) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        return f"(no log: {error.strerror})"
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:]) or "  (the log is empty)"


def _main(state: State, name: str) -> psutil.Process | None:
    service = state.services.get(name)
    return processes.same(service.pid, service.created) if service else None


def _all(state: State, name: str) -> list[psutil.Process]:
    """Every process of a service: its recorded main one, the marked ones, their children and sessions."""
    main, service = _main(state, name), state.services.get(name)
    roots = [*processes.marked(state.stack, name), *([main] if main else [])]
    if service and service.pid and service.created and not main:
        roots += processes.orphans(service.pid, service.created)
    return processes.family(roots)


def _end_service(state: State, name: str, grace_s: float) -> list[psutil.Process]:
    left: list[psutil.Process] = []
    for _ in range(3):  # again, because a dying parent may have started a last child
        members = _all(state, name)
        if not members:
            break
        main = _main(state, name)
        left = processes.end(members, grace_s, [main] if main else [])
    return left


def down(state_dir: Path | None = None, *, purge: bool = False, progress: Progress = lambda line: None) -> bool:
    """Stop everything that `up` started from this directory, also after the program that called it was killed.

    Args:
        state_dir: As for `up`.
        purge: Remove the data, logs and secrets as well.
        progress: Receives one line of text at a time.

    Returns:
        Whether there was anything to stop.

    Raises:
        StackError: a process does not end, or the state cannot be read.
    """
    progress = _unbroken(progress)
    state_dir = (state_dir or default_dir()).expanduser().absolute()
    if states.load(state_dir) is None:
        return False
    with states.locked(state_dir):
        state = states.load(state_dir)
        if state is None:
            return False
        stopped = _stop(state_dir, state, state.names, progress)
        if purge:
            for name in ("ray", "mlflow", "s3", "logs", "secrets"):
                shutil.rmtree(state_dir / name, ignore_errors=True)
            for name in ("state.json", "lock"):
                (state_dir / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                state_dir.rmdir()  # only when nothing else is in it
            progress(f"data, logs and secrets in {state_dir} deleted")
    return stopped


def _stop(state_dir: Path, state: State, names: Sequence[str], progress: Progress) -> bool:
    stopped = False
    if "ray" in names and _all(state, "ray"):
        _stop_jobs(state_dir, state, progress)
    for name in reversed(state.names):
        if name not in names:
            continue
        members = _all(state, name)
        left = _end_service(state, name, _GRACE_S[states.kind(name)])
        if left:
            raise StackError(
                services.title(name),
                expected="it to end",
                found=", ".join(f"pid {process.pid}" for process in left) + " still there after SIGKILL",
                remedy="look at what holds it with `ps`, then run `tomoscale down` again",
            )
        if name == "s3" and name in state.services:
            services.remove_sockets(state.services[name].ports)
        if members:
            stopped = True
            progress(f"{services.title(name)} stopped")
        state.services.pop(name, None)
        states.save(state_dir, state)
    return stopped


def _stop_jobs(state_dir: Path, state: State, progress: Progress) -> None:
    """Ask running jobs to end while the server that knows them is there; what does not listen is killed with Ray."""
    service = state.services.get("ray")
    if service is None or service.healthy_s is None or _main(state, "ray") is None:
        return
    from cluster import jobclient

    try:
        stopped = jobclient.stop_all(
            f"http://{services.HOST}:{service.ports['dashboard']}", token=states.secret(state_dir, "ray_token")
        )
    except StackError as error:
        progress(f"jobs could not be asked to stop: {error.found or error}")
        return
    for job in stopped:
        progress(f"job {job} stopped")


def _drop_old_sessions(state_dir: Path) -> None:
    """Keep Ray's last session, whose logs may be wanted, and no older one."""
    sessions = sorted(path for path in (state_dir / "ray").glob("session_2*") if path.is_dir())
    for path in sessions[:-1]:
        shutil.rmtree(path, ignore_errors=True)


def status(state_dir: Path | None = None) -> StackInfo:
    """Look at every service; `running` is False where nothing was started.

    Raises:
        StackError: the state cannot be read.
    """
    state_dir = (state_dir or default_dir()).expanduser().absolute()
    state = states.load(state_dir)
    return _info(state_dir, state) if state else StackInfo(state_dir, (), 0)


def _info(state_dir: Path, state: State) -> StackInfo:
    infos = []
    probes = {"s3": services.s3_problem, "mlflow": services.mlflow_problem, "ray": services.ray_problem}
    for name in state.names:
        service = state.services.get(name)
        if service is None:
            continue
        port = service.ports[services.PORTS[states.kind(name)][0]]
        main = _main(state, name)
        if main is None:
            detail = "no process"
        elif name in probes:
            detail = probes[name](state_dir, port)
        else:
            detail = services.node_problem(state_dir, state.services["ray"].ports["dashboard"], name)
        infos.append(
            ServiceInfo(
                name,
                f"{'http://' if name in probes else ''}{services.HOST}:{port}",
                main.pid if main else None,
                not detail,
                detail,
                service.healthy_s,
                round(family_mb(main), 1),
            )
        )
    return StackInfo(state_dir, tuple(infos), state.cpus)


def environment(state_dir: Path | None = None) -> dict[str, str]:
    """The variables that a client process of the stack needs, secrets included: S3, MLflow, Ray jobs, no telemetry.

    The names in `services.UNSET` must be absent beside them.

    Raises:
        StackError: the stack was not started.
    """
    state_dir = (state_dir or default_dir()).expanduser().absolute()
    state = states.load(state_dir)
    if state is None or any(name not in state.services for name in states.SERVICES):
        raise absent(state_dir)
    return services.client_environment(state_dir, {name: service.ports for name, service in state.services.items()})
