"""up, down, status, env, doctor."""

import argparse
import shlex
import sys

from cluster import doctor, services, stack, stack_info
from cluster import state as states
from jobs.cli.verbs.common import add_json, add_state, job_address, state_dir, use_stack
from jobs.options import whole
from jobs.output import emit, table


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verbs."""
    up = verbs.add_parser("up", help="start the local stack: S3, MLflow, Ray; on loopback, with tokens")
    add_state(up)
    for name in ("s3", "mlflow", "dashboard"):
        up.add_argument(f"--{name}-port", type=whole(0, 65535), default=0, metavar="PORT", help="0 picks a free one")
    up.add_argument("--cpus", type=whole(1), metavar="N", help="logical CPUs that Ray offers (default: at least 4)")
    up.add_argument(
        "--nodes",
        type=whole(1, 64),
        metavar="N",
        help="Ray nodes, the head among them, each with these CPUs (default: as before, at first 1)",
    )
    add_json(up)
    up.set_defaults(run=_up)
    down = verbs.add_parser("down", help="stop exactly what `up` started")
    add_state(down)
    down.add_argument("--purge", action="store_true", help="delete the stack's data as well")
    down.set_defaults(run=_down)
    status = verbs.add_parser("status", help="show the local stack")
    add_state(status)
    add_json(status)
    status.set_defaults(run=_status)
    env = verbs.add_parser("env", help='print the stack\'s environment as shell exports: eval "$(tomoscale env)"')
    add_state(env)
    env.set_defaults(run=_env)
    check = verbs.add_parser("doctor", help="check this machine and the services it would use")
    check.add_argument("--nodes", action="store_true", help="ask every node of the cluster instead of this machine")
    check.add_argument("--address", metavar="URL", help="job server of --nodes; the local stack's when empty")
    check.add_argument("--store", default="s3://runs", metavar="URL", help="bucket to try S3 on (default: s3://runs)")
    add_state(check)
    add_json(check)
    check.set_defaults(run=_doctor)


def _up(arguments: argparse.Namespace) -> int:
    info = stack.up(
        state_dir(arguments),
        s3_port=arguments.s3_port,
        mlflow_port=arguments.mlflow_port,
        dashboard_port=arguments.dashboard_port,
        cpus=arguments.cpus,
        nodes=arguments.nodes,
        progress=_say,
    )
    metrics = _metrics(info)
    emit(info.to_json() | {"metrics": metrics}, arguments.json, _describe(info, metrics))
    return 0


def _down(arguments: argparse.Namespace) -> int:
    if not stack.down(state_dir(arguments), progress=_say, purge=arguments.purge):
        print("nothing was running")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    info = stack.status(state_dir(arguments))
    metrics = _metrics(info)
    emit(info.to_json() | {"metrics": metrics}, arguments.json, _describe(info, metrics))
    return 0 if info.healthy else 1


def _metrics(info: stack_info.StackInfo) -> str:
    """Where Prometheus reads what jobs show; empty where Ray was not started."""
    state = states.load(info.state_dir)
    ray = state.services.get("ray") if state else None
    return f"http://{services.HOST}:{ray.ports['metrics']}/metrics" if ray and "metrics" in ray.ports else ""


def _env(arguments: argparse.Namespace) -> int:
    settings = stack.environment(state_dir(arguments))  # first: without a stack a shell stays as it is
    print(f"unset {' '.join(services.UNSET)}")
    for key, value in settings.items():
        print(f"export {key}={shlex.quote(value)}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    use_stack(arguments)
    if arguments.nodes:
        from jobs.nodes import ask

        doctor.require_s3(arguments.store)
        return ask.show(ask.ask_cluster(job_address(arguments), arguments.store), arguments.json)
    checks = doctor.run(arguments.store, state_dir(arguments))
    data = [{"check": c.name, "ok": c.ok, "found": c.finding, "remedy": c.remedy} for c in checks]
    rows = [("ok" if c.ok else "FAILED", c.name, c.finding, "" if c.ok else c.remedy) for c in checks]
    emit(data, arguments.json, table(("", "check", "found", "what to do"), rows))
    return 0 if all(c.ok for c in checks) else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _describe(info: stack_info.StackInfo, metrics: str = "") -> str:
    if not info.services:
        return f"no stack in {info.state_dir}; start one with `tomoscale up`"
    rows = [
        (services.title(s.name), "up" if s.healthy else s.detail, s.url, s.pid, round(s.resident_mb), s.healthy_s)
        for s in info.services
    ]
    lines = [table(("service", "state", "address", "pid", "MB", "started in s"), rows), f"state: {info.state_dir}"]
    if info.healthy:
        lines += [
            "",
            "submit a job:        tomoscale pretrain CONFIG",
            f"or with Ray's own:   ray job submit --address {info.jobs_address} --working-dir . --"
            " python -m jobs.pretrain CONFIG",
            'use it from a shell: eval "$(tomoscale env)"',
        ]
        lines += [f"metrics of its jobs: {metrics}"] if metrics else []
    return "\n".join(lines)
