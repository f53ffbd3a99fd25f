"""The driver that asks each node, and the client that sends it."""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import jobclient
from cluster.doctor import Check
from jobs.nodes.look import differences, look, versions
from jobs.nodes.report import Node, from_json, sentences, text, to_json
from jobs.on_ray.session import connect
from jobs.output import emit, last_line
from storage.errors import StackError

_ANSWER_S = 180.0
"""For all nodes together: a process has to start on each, and S3 and MLflow may be away."""
_MARK = "nodes: "


def main(argv: Sequence[str]) -> int:
    """Ask every node of the cluster that this process belongs to."""
    usage = argparse.ArgumentParser(prog="python -m jobs.nodes")
    usage.add_argument("--store", default="s3://runs", metavar="URL", help="bucket to try S3 on (default: s3://runs)")
    usage.add_argument("--client", type=Path, metavar="FILE", help="versions of the client (default: this process's)")
    usage.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = usage.parse_args(argv)
    client = versions() if arguments.client is None else json.loads(arguments.client.read_text(encoding="utf-8"))
    connect()
    nodes = ask(client, arguments.store)
    if arguments.json:
        print(_MARK + json.dumps(to_json(nodes)), flush=True)
        return 0
    print(text(nodes), flush=True)
    return 1 if sentences(nodes) else 0


def ask(client: Mapping[str, str], store: str) -> list[Node]:
    """Every node's answer, in the order of their addresses.

    Args:
        client: Its versions.
        store: As of `cluster.doctor.run`.
    """
    listed: Any = ray.nodes  # typed by nobody
    task: Any = ray.remote(num_cpus=0, max_retries=0)(look)
    answers = {}
    for node in listed():
        if node["Alive"]:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            gpus = float(node["Resources"].get("GPU", 0))
            answers[task.options(scheduling_strategy=place).remote(store, gpus)] = node
    ended, _ = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER_S)
    nodes = [Node(_name(node), _checks(client, answer, answer in ended)) for answer, node in answers.items()]
    return sorted(nodes, key=lambda node: node.name)


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"


def _checks(client: Mapping[str, str], answer: Any, ended: bool) -> list[Check]:
    remedy = "compare its image, its Python and its environment with those of the head"
    if not ended:
        return [Check("answer", False, f"none within {_ANSWER_S:.0f} s", remedy)]
    try:
        node, checks = ray.get(answer)
    except ray.exceptions.RayError as error:
        return [no_answer(error, remedy)]
    return [*differences(client, node), *checks]


def no_answer(error: ray.exceptions.RayError, remedy: str) -> Check:
    """Why a node does not answer.

    Args:
        error: Of Ray, such as of a node without this module.
        remedy: For a node that is there.
    """
    if isinstance(error, (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError)):
        found = "Ray counts it, and it is gone: its machine or its Ray process ended a moment ago"
        return Check("answer", False, found, "see whether it is on, and ask again in half a minute")
    return Check("answer", False, last_line(error), remedy)


def ask_cluster(address: str, store: str) -> list[Node]:
    """Send the driver as a job and read what it says.

    Args:
        address: Of the job server.
        store: As of `cluster.doctor.run`.

    Raises:
        StackError: the job failed.
    """
    with tempfile.TemporaryDirectory(prefix="tomoscale-job-") as folder:
        (Path(folder) / "client.json").write_text(json.dumps(versions()), encoding="utf-8")
        job = jobclient.submit(
            address,
            f"python -m jobs.nodes --json --client client.json --store {shlex.quote(store)}",
            working_dir=Path(folder),
            submission_id=f"doctor-{time.strftime('%H%M%S')}-{time.time_ns() % 10000:04d}",
            metadata={"tomoscale.name": "doctor", "tomoscale.module": "jobs.nodes"},
        )
    log = "".join(jobclient.follow(address, job, say=lambda line: print(line, file=sys.stderr, flush=True)))
    answers = [line for line in log.splitlines() if line.startswith(_MARK)]
    if not answers:
        raise StackError(
            f"job {job}",
            expected="an answer of the nodes",
            found=log.strip().splitlines()[-1][-300:] if log.strip() else jobclient.status(address, job).message[:300],
            remedy=f"see its log: tomoscale jobs logs {job}; the head needs this version of tomoscale",
        )
    return from_json(json.loads(answers[-1].removeprefix(_MARK)))


def show(nodes: Sequence[Node], as_json: bool) -> int:
    """Print the answers; 1 where something is not well."""
    emit(to_json(nodes), as_json, text(nodes))
    return 1 if sentences(nodes) else 0
